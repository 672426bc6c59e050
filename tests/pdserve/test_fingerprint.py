import numpy as np

from pdserve import fingerprint


def weights(folder, data: bytes, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return fingerprint.of_weights(folder)


def test_equal_weights_are_equal_wherever_they_lie_and_a_fine_tune_differs(tmp_path):
    data = bytearray(np.random.default_rng().integers(0, 256, 3 << 20, dtype=np.uint8).tobytes())
    one = weights(tmp_path / "a", data)
    assert weights(tmp_path / "b", data) == one
    tuned = bytearray(data)
    for i in range(0, len(tuned), 1000):
        tuned[i] ^= 1
    assert weights(tmp_path / "c", tuned) != one
    assert weights(tmp_path / "d", data + b"x") != one


def test_a_folder_without_weights_has_no_fingerprint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert fingerprint.of_weights(tmp_path) is None


def test_where_a_model_came_from_does_not_matter_but_what_it_computes_does():
    base = {"hidden_size": 8, "_name_or_path": "/a", "rope_theta": 1e4}
    one = fingerprint.of_config(base, "bfloat16")
    assert fingerprint.of_config({**base, "_name_or_path": "/b"}, "bfloat16") == one
    assert fingerprint.of_config({**base, "rope_theta": 1e5}, "bfloat16") != one
    assert fingerprint.of_config(base, "float32") != one
    assert fingerprint.of_config(base, "bf", "loat16") != one

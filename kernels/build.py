"""Compiles csrc/ once for this machine and keeps the result under PDSERVE_HOME/build, named by what went into it."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
TIMEOUT_S = 120


class BuildError(Exception):
    """No compiler, or it refused; the message says which."""


def compiler() -> str | None:
    """The C++ compiler to use: $CXX, else g++, else clang++."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def _cpu_identity() -> str:
    """-march=native depends on the CPU: a home folder shared by several machines must not mix their builds."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        return platform.processor()
    return platform.processor()


def cpu_library(build_root: Path) -> Path:
    """Path of the CPU library, compiled now if it is not there. Raises BuildError."""
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler found (looked for $CXX, g++, clang++)")
    sources = [SOURCES / "cpu.cpp", SOURCES / "digest.h"]
    identity = hashlib.sha256()
    for part in (cxx, *FLAGS, platform.machine(), _cpu_identity()):
        identity.update(part.encode() + b"\0")
    for source in sources:
        identity.update(source.read_bytes())
    target = build_root / f"cpu-{identity.hexdigest()[:16]}.so"
    if target.exists():
        return target
    build_root.mkdir(parents=True, exist_ok=True)
    # Written beside its target and renamed: several engines may start at the same moment.
    with tempfile.TemporaryDirectory(dir=build_root) as folder:
        made = Path(folder) / "lib.so"
        try:
            done = subprocess.run(
                [cxx, *FLAGS, str(sources[0]), "-o", str(made)],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            raise BuildError(f"{cxx} could not be run: {e}") from e
        if done.returncode:
            raise BuildError(f"{cxx} failed: {done.stderr.strip()[-500:]}")
        made.replace(target)
    return target

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
GPU_FLAGS = {
    "nvcc": ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-arch={arch}"),
    "hipcc": ("-O3", "-std=c++17", "-shared", "-fPIC", "-x", "hip", "--offload-arch={arch}", "-Wno-unused-result"),
}
TIMEOUT_S = 120


class BuildError(Exception):
    """No compiler, or it refused; the message says which."""


def compiler() -> str | None:
    """The C++ compiler to use: $CXX, else g++, else clang++."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def gpu_compiler(arch: str) -> tuple[str, str] | None:
    """(kind, path) of nvcc for "sm_90" and the like, of hipcc for "gfx90a" and the like."""
    kind, variables, usual = (
        ("hipcc", ("ROCM_PATH", "HIP_PATH"), "/opt/rocm")
        if arch.startswith("gfx")
        else ("nvcc", ("CUDA_HOME", "CUDA_PATH"), "/usr/local/cuda")
    )
    for folder in (*(os.environ.get(v) for v in variables), usual):
        if folder and (found := shutil.which(kind, path=os.path.join(folder, "bin"))):
            return kind, found
    found = shutil.which(kind)
    return (kind, found) if found else None


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
    return _host_library(build_root, "cpu", ("cpu.cpp", "digest.h", "rounded.h"))


def receive_library(build_root: Path) -> Path:
    """Path of what receives from sockets (receive.py), compiled now if it is not there. Raises BuildError."""
    return _host_library(build_root, "receive", ("receive.cpp", "digest.h"))


def _host_library(build_root: Path, name: str, sources: tuple[str, ...]) -> Path:
    """Compiled for this processor; the first of `sources` includes the others."""
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler found (looked for $CXX, g++, clang++)")
    identity = (cxx, *FLAGS, platform.machine(), _cpu_identity())
    return _built([cxx, *FLAGS, str(SOURCES / sources[0])], sources, identity, build_root, name)


def gpu_library(build_root: Path, arch: str) -> Path:
    """Path of the GPU library for `arch` ("sm_90", "gfx90a"), compiled now if it is not there. Raises BuildError."""
    found = gpu_compiler(arch)
    if found is None:
        raise BuildError(f"no {'hipcc' if arch.startswith('gfx') else 'nvcc'} found to compile for {arch}")
    kind, path = found
    flags = [flag.format(arch=arch) for flag in GPU_FLAGS[kind]]
    sources = ("blocks.cu", "blocks.cuh", "gpu.h", "digest.h", "rounded.h")
    identity = (path, *flags, platform.machine())
    return _built([path, *flags, str(SOURCES / "blocks.cu")], sources, identity, build_root, arch)


def _environment() -> dict[str, str]:
    """hipcc hands everything to nvcc where it finds one, unless it is told not to."""
    return {**os.environ, "HIP_PLATFORM": "amd"}


def _built(command: list[str], sources: tuple[str, ...], identity: tuple[str, ...], root: Path, name: str) -> Path:
    """The library that `command` makes, made now unless one of the same sources and identity is there."""
    digest = hashlib.sha256()
    for part in identity:
        digest.update(part.encode() + b"\0")
    for source in sources:
        digest.update((SOURCES / source).read_bytes())
    target = root / f"{name}-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    root.mkdir(parents=True, exist_ok=True)
    # Written beside its target and renamed: several engines may start at the same moment.
    with tempfile.TemporaryDirectory(dir=root) as folder:
        made = Path(folder) / "lib.so"
        try:
            done = subprocess.run(
                [*command, "-o", str(made)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=_environment()
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            raise BuildError(f"{command[0]} could not be run: {e}") from e
        if done.returncode:
            raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
        made.replace(target)
    return target

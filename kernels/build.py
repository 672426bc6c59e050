"""Compiles csrc/ once for this machine and keeps the result under PDSERVE_HOME/build, named by what went into it.

The GPU path in two ways: nvcc or hipcc make one library; else NVRTC makes the kernels and a C++ compiler the host part.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import nvrtc

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")
GPU_FLAGS = {
    "nvcc": ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-x", "cu", "-arch={arch}"),
    "hipcc": ("-O3", "-std=c++17", "-shared", "-fPIC", "-x", "hip", "--offload-arch={arch}", "-Wno-unused-result"),
}
NVRTC_FLAGS = ("--std=c++17",)
KERNEL_SOURCES = ("blocks.cuh", "gpu.h", "job.h", "digest.h", "rounded.h")
HOST_SOURCES = ("lanes.cpp", "gpu.h", "driver.h", "job.h", "digest.h", "rounded.h")
#: what PDSERVE_KERNELS may name
WAYS = ("nvcc", "hipcc", "nvrtc", "torch")
TIMEOUT_S = 120
LOG_CHARACTERS = 2000


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


def lanes_library(build_root: Path) -> Path:
    """The GPU path's host part alone, over the driver's functions, compiled now if it is not there. Raises BuildError."""
    return _host_library(build_root, "lanes", HOST_SOURCES)


def _host_library(build_root: Path, name: str, sources: tuple[str, ...]) -> Path:
    """Compiled for this processor; the first of `sources` includes the others."""
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler found (looked for $CXX, g++, clang++)")
    identity = (cxx, *FLAGS, platform.machine(), _cpu_identity())
    return _built([cxx, *FLAGS, str(SOURCES / sources[0]), "-ldl"], sources, identity, build_root, name)


@dataclass(frozen=True)
class GpuBuild:
    """`library`: the host part; `code`: the kernels, where they are not in the library; `how`: for people."""

    library: Path
    code: Path | None
    how: str


def gpu_library(build_root: Path, arch: str) -> GpuBuild:
    """What moves KV on `arch` ("sm_90", "gfx90a"), compiled now if it is not there. Raises BuildError.

    nvcc or hipcc where there is one, else NVRTC. PDSERVE_KERNELS names one way, for tests; "torch" is none of them.
    """
    wanted = os.environ.get("PDSERVE_KERNELS", "")
    if wanted not in ("", *WAYS):
        raise BuildError(f"PDSERVE_KERNELS={wanted!r} is not one of {', '.join(WAYS)}")
    toolkit = "hipcc" if arch.startswith("gfx") else "nvcc"
    problems = [f"PDSERVE_KERNELS={wanted}"] if wanted else []
    for way, made_by in ((toolkit, _by_toolkit), ("nvrtc", _by_nvrtc)):
        if wanted not in ("", way) or (way == "nvrtc" and toolkit == "hipcc"):
            continue
        try:
            return made_by(build_root, arch)
        except BuildError as e:
            problems.append(str(e))
    raise BuildError("; ".join(problems))


def _by_toolkit(build_root: Path, arch: str) -> GpuBuild:
    found = gpu_compiler(arch)
    if found is None:
        raise BuildError(f"no {'hipcc' if arch.startswith('gfx') else 'nvcc'} found to compile for {arch}")
    kind, path = found
    flags = [flag.format(arch=arch) for flag in GPU_FLAGS[kind]]
    sources = (*HOST_SOURCES, *KERNEL_SOURCES)
    identity = (path, *flags, platform.machine())
    made = _built([path, *flags, str(SOURCES / "lanes.cpp")], sources, identity, build_root, arch)
    return GpuBuild(made, None, f"compiled with {path}")


def _by_nvrtc(build_root: Path, arch: str) -> GpuBuild:
    """The host part by the C++ compiler, the kernels by the first NVRTC that takes them."""
    problems = []
    for path in nvrtc.libraries():
        try:
            version, code = _kernels(build_root, arch, nvrtc.Nvrtc(path))
        except nvrtc.NvrtcError as e:
            problems.append(f"for {arch}, {e}"[:LOG_CHARACTERS])
        else:
            how = f"compiled with NVRTC {version} ({path}) and {compiler()}"
            return GpuBuild(lanes_library(build_root), code, how)
    raise BuildError("; ".join(problems) or "no libnvrtc.so found (PyPI: nvidia-cuda-nvrtc; CUDA 12: nvidia-cuda-nvrtc-cu12)")


def _kernels(build_root: Path, arch: str, by: nvrtc.Nvrtc) -> tuple[str, Path]:
    """(NVRTC's version, cubin)"""

    def make(to: Path) -> None:
        to.write_bytes(by.cubin(SOURCES / "blocks.cuh", [*NVRTC_FLAGS, f"--gpu-architecture={arch}", f"-I{SOURCES}"]))

    identity = (f"nvrtc {by.version}", *NVRTC_FLAGS)
    return by.version, _kept(make, KERNEL_SOURCES, identity, build_root, arch, "cubin")


def _environment() -> dict[str, str]:
    """hipcc hands everything to nvcc where it finds one, unless it is told not to."""
    return {**os.environ, "HIP_PLATFORM": "amd"}


def _built(command: list[str], sources: tuple[str, ...], identity: tuple[str, ...], root: Path, name: str) -> Path:
    """The library that `command` makes."""

    def make(to: Path) -> None:
        done = subprocess.run(
            [*command, "-o", str(to)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=_environment()
        )
        if done.returncode:
            raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-LOG_CHARACTERS:]}")

    try:
        return _kept(make, sources, identity, root, name, "so")
    except (OSError, subprocess.TimeoutExpired) as e:
        raise BuildError(f"{command[0]} could not be run: {e}") from e


def _kept(
    make: Callable[[Path], None], sources: tuple[str, ...], identity: tuple[str, ...], root: Path, name: str, ending: str
) -> Path:
    """The file that `make` writes, made now unless one of the same sources and identity is there."""
    digest = hashlib.sha256()
    for part in identity:
        digest.update(part.encode() + b"\0")
    for source in sources:
        digest.update((SOURCES / source).read_bytes())
    target = root / f"{name}-{digest.hexdigest()[:16]}.{ending}"
    if target.exists():
        return target
    root.mkdir(parents=True, exist_ok=True)
    # Written beside its target and renamed: several engines may start at the same moment.
    with tempfile.TemporaryDirectory(dir=root) as folder:
        made = Path(folder) / "made"
        make(made)
        made.replace(target)
    return target

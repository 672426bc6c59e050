"""Which code moves KV here: compiled for this CPU or numpy; for each GPU architecture a compiled library or plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pdserve import env, kernels
from pdserve.doctor import gpu
from pdserve.doctor.finding import Finding, ok, warn
from pdserve.doctor.subject import Subject
from pdserve.kernels import build

NAME = "kernels"
DEADLINE = 180.0  # the first time, it compiles: nvcc takes up to a minute


@dataclass(frozen=True)
class GpuPath:
    """How an engine on this architecture moves blocks. `compiler`: its path, empty when there is none."""

    arch: str
    compiler: str
    problem: str = ""


def check(subject: Subject) -> Iterator[Finding]:
    yield judge_cpu(*kernels.path(), compiler=build.compiler() or "")
    for arch in sorted({d["arch"] for d in gpu.look().cuda["devices"]}):
        yield judge_gpu(look(arch))


def look(arch: str) -> GpuPath:
    found = build.gpu_compiler(arch)
    try:
        build.gpu_library(env.home() / "build", arch)
    except build.BuildError as error:
        return GpuPath(arch, found[1] if found else "", str(error))
    return GpuPath(arch, found[1] if found else "")


def judge_cpu(path: str, why_not: str, compiler: str) -> Finding:
    if path == "native":
        return ok(NAME, f"CPU: compiled for this machine ({compiler})", path=path)
    means = f"numpy moves KV instead, several times slower, with the same results ({why_not})."
    return warn(NAME, "CPU: not compiled", means, "Install a C++ compiler (Debian: apt-get install g++); nothing else.")


def judge_gpu(found: GpuPath) -> Finding:
    if not found.problem:
        return ok(
            NAME, f"{found.arch}: compiled with {found.compiler}" if found.compiler else f"{found.arch}: compiled"
        )
    tool = "hipcc (ROCm)" if found.arch.startswith("gfx") else "nvcc (CUDA toolkit)"
    means = f"Plain torch moves KV on the GPU: the same results, slower ({found.problem})."
    fix = f"Install {tool}, or set CUDA_HOME to where it is; the library is kept in {env.home() / 'build'}."
    return warn(NAME, f"{found.arch}: no compiled kernels", means, fix)

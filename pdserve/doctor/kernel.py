"""Which code moves KV here: compiled for this CPU or numpy; for each GPU architecture what compiled it, or plain torch."""

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
    """How an engine on this architecture moves blocks. `how`: what compiled the kernels, empty when nothing did."""

    arch: str
    how: str
    problem: str = ""


def check(subject: Subject) -> Iterator[Finding]:
    yield judge_cpu(*kernels.path(), compiler=build.compiler() or "")
    for arch in sorted({d["arch"] for d in gpu.look().cuda["devices"]}):
        yield judge_gpu(look(arch))


def look(arch: str) -> GpuPath:
    try:
        return GpuPath(arch, build.gpu_library(env.home() / "build", arch).how)
    except build.BuildError as error:
        return GpuPath(arch, "", str(error))


def judge_cpu(path: str, why_not: str, compiler: str) -> Finding:
    if path == "native":
        return ok(NAME, f"CPU: compiled for this machine ({compiler})", path=path)
    means = f"numpy moves KV instead, several times slower, with the same results ({why_not})."
    return warn(NAME, "CPU: not compiled", means, "Install a C++ compiler (Debian: apt-get install g++); nothing else.")


def judge_gpu(found: GpuPath) -> Finding:
    if not found.problem:
        return ok(NAME, f"{found.arch}: {found.how}", path=found.how)
    means = f"Plain torch moves KV on the GPU: the same results, several times slower ({found.problem})."
    tools = "hipcc (ROCm)"
    if not found.arch.startswith("gfx"):
        tools = "g++, and either nvcc (CUDA toolkit; CUDA_HOME says where) or NVRTC (pip install nvidia-cuda-nvrtc)"
    fix = f"Install {tools}; what they make is kept in {env.home() / 'build'}."
    if env.kernels():
        fix = f"Unset PDSERVE_KERNELS, or: {fix[0].lower()}{fix[1:]}"
    return warn(NAME, f"{found.arch}: no compiled kernels", means, fix)

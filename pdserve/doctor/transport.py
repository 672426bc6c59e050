"""How chunks could reach another host: RDMA devices, and the libraries of the transports that use them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pdserve.doctor.finding import Finding, ok, warn
from pdserve.doctor.subject import Subject

NAME = "ucx"
LIBRARIES = ("ucxx", "nixl")


@dataclass(frozen=True)
class Device:
    name: str
    port: str
    state: str  # "ACTIVE", "DOWN", ...
    rate: str


def check(subject: Subject) -> Iterator[Finding]:
    yield judge(devices(), [name for name in LIBRARIES if importlib.util.find_spec(name) is not None])


def devices(root: Path = Path("/sys/class/infiniband")) -> list[Device]:
    found = []
    for port in sorted(root.glob("*/ports/*")):
        state = _read(port / "state").partition(":")[2].strip() or "unknown"
        found.append(Device(port.parent.parent.name, port.name, state, _read(port / "rate")))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def judge(found: list[Device], libraries: list[str]) -> Finding:
    """A machine without RDMA is complete: tcp:// needs nothing."""
    library = f"libraries: {', '.join(libraries)}" if libraries else "neither ucxx nor nixl is installed"
    active = [device for device in found if device.state == "ACTIVE"]
    if not found:
        return ok(NAME, f"no RDMA device, tcp:// serves; {library}")
    text = ", ".join(f"{d.name}/{d.port} {d.state} {d.rate}".strip() for d in found)
    if not active:
        means = "There is an RDMA device, but no port of it is up: ucx:// would fall back to TCP."
        return warn(NAME, text, means, "Check the cable and the switch, and the subnet manager (ibstat, rdma link).")
    if not libraries:
        means = "RDMA is there but cannot be used: chunks travel over tcp://."
        return warn(NAME, f"{text}; {library}", means, "pip install 'pdserve[ucx]'")
    return ok(NAME, f"{text}; {library}")

"""How chunks could reach another host: RDMA devices, and the libraries of the transports that use them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pdserve.doctor import child
from pdserve.doctor.finding import Finding, fail, ok, warn
from pdserve.doctor.subject import Subject

NAME = "ucx"
DEADLINE = 40.0
_CHILD_SECONDS = 35.0
#: what a scheme of peers.transport needs
LIBRARY_OF = {"ucx": "ucxx", "nixl": "nixl"}


@dataclass(frozen=True)
class Device:
    name: str
    port: str
    state: str  # "ACTIVE", "DOWN", ...
    rate: str


def check(subject: Subject) -> Iterator[Finding]:
    try:
        libraries = child.ask("pdserve.doctor.probe_ucx", seconds=_CHILD_SECONDS)
    except child.ChildError as error:
        libraries = {"ucxx": {"version": "", "error": str(error)}}
    peers = subject.plan.whole.peers if subject.plan is not None else None
    yield judge(devices(), libraries, peers.transport if peers is not None else "tcp")


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


def judge(found: list[Device], libraries: dict[str, dict[str, str]], wanted: str) -> Finding:
    """A machine without RDMA is complete: tcp:// needs nothing. `wanted`: the scheme that the topology's peers use."""
    loaded = [f"{name} {facts['version']}".strip() for name, facts in libraries.items() if not facts["error"]]
    broken = [f"{name}: {facts['error']}" for name, facts in libraries.items() if facts["error"]]
    library = f"loads {', '.join(loaded)}" if loaded else "neither ucxx nor nixl is installed"
    needed = LIBRARY_OF.get(wanted)
    if needed and not any(name.startswith(needed) for name in loaded):
        means = f"The topology says peers.transport: {wanted}, which needs {needed}: daemons refuse to start."
        return fail(
            NAME, "; ".join([*broken, library]), means, f"pip install 'pdserve[{wanted}]', or peers.transport: tcp."
        )
    if broken:
        means = "An RDMA library is installed and cannot be loaded; tcp:// serves."
        return warn(NAME, "; ".join(broken), means, "Install it again: pip install 'pdserve[ucx]'; or remove it.")
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

"""One engine as the proxy sees it: whether it may be sent requests, and how busy it is. No I/O but its connections.

up          it answers its health probe
draining    it finishes what it has and gets nothing new
on trial    it was down and answers again: one request at a time until one has gone well
resting     too many legs failed in a row although it answers probes: down until `rest_until`
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from pdserve.proxy.shared import Alone, Shared
from pdserve.proxy.upstream import LegFailure, Upstream

STRIKES = 5  # legs that fail in a row before an engine has to rest
REST = 5.0  # seconds; doubled each time that the trial after it fails, up to MAX_REST
MAX_REST = 60.0


@dataclass(eq=False)
class Instance:
    """`role` is prefill, decode or both."""

    name: str
    role: str
    upstream: Upstream
    place: str = ""  # the name of its host, where there are several
    up: bool = False
    draining: bool = False
    trial: bool = False
    was_up: bool = False
    in_flight: int = 0
    failures: int = 0  # probes that failed in a row
    strikes: int = 0  # legs that failed in a row
    rest: float = REST
    rest_until: float = 0.0
    probes: int = 0
    reported: int = 0  # requests that the engine says it has
    others: int = 0  # of those, not ours
    models: frozenset[str] = frozenset()
    born: bytes = b""  # when its process started, as it says
    exposed: bytes = b""  # its /metrics, as read last
    shared: Shared = field(default_factory=Alone)

    @property
    def host(self) -> str:
        return urlsplit(self.upstream.url).hostname or ""

    @property
    def load(self) -> int:
        return self.in_flight + max(self.others, self.shared.others(self.name))

    @property
    def usable(self) -> bool:
        return self.up and not self.draining

    @property
    def state(self) -> str:
        if self.draining:
            return "draining"
        return ("trial" if self.trial else "up") if self.up else "down"

    def serving(self) -> _Serving:
        """`with` it, a request counts as running here."""
        return _Serving(self)

    def told_load(self, requests: int) -> None:
        self.reported, self.others = requests, max(0, requests - self.in_flight)

    def went_well(self) -> None:
        self.strikes, self.trial, self.rest = 0, False, REST

    def went_badly(self, failure: LegFailure, now: float) -> bool:
        """Counts a failed leg. True if the engine has to rest now."""
        if failure.reason == "diverged":
            return False
        self.strikes += 1
        if not self.trial and self.strikes < STRIKES:
            return False
        self.rest_until = now + self.rest
        self.rest = min(MAX_REST, 2 * self.rest)
        self.strikes = 0
        return True


class _Serving:
    """Not a generator: entered twice by each request."""

    __slots__ = ("_instance",)

    def __init__(self, instance: Instance) -> None:
        self._instance = instance

    def __enter__(self) -> None:
        self._instance.in_flight += 1
        self._instance.shared.add(self._instance.name, 1)

    def __exit__(self, *exc: object) -> None:
        self._instance.in_flight -= 1
        self._instance.shared.add(self._instance.name, -1)


def preferred(instances: list[Instance]) -> list[Instance]:
    """Those that may be sent a request: one on trial only while it is idle, unless there is no other."""
    sound = [i for i in instances if not i.trial]
    if len(sound) == len(instances):
        return instances
    return [i for i in instances if not i.trial or i.in_flight == 0 or not sound]

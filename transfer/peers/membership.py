"""Who takes part: what the sources list, what each peer said of itself, and whether it answers. Pure: time is handed in.

    joining   listed, has not answered yet
    up        has answered; chunks are asked of it and sent to it
    draining  finishes and gives, is sent nothing new
    down      a call failed or was not answered in time: left alone, then tried again after a pause that grows
    gone      said goodbye; back when it answers again

A peer is named by the URL at which it listens. A call that is not answered opens the circuit at once: a peer that accepts
and never answers costs one deadline, not one for each request.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from pdserve.transfer.peers.messages import DISK, MEMORY
from pdserve.transfer.tiers.breaker import CLOSED, Breaker, BreakerOptions

#: one failure is enough to leave a peer alone for a moment; it is tried again for ever
CAREFUL = BreakerOptions(failures=1, first_pause=0.5, longest_pause=15.0, probe_patience=10.0)
#: bytes per second that a peer is believed to send before anything came from it
FIRST_SPEED = 100e6
#: reasons for leaving a peer alone that are told before it is well again
MOST_TOLD = 8
#: how much the last observation counts
_WEIGHT = 0.3


@dataclass
class Member:
    url: str
    name: str = ""  # as listed, then as it says itself
    aliases: tuple[str, ...] = ()  # what else it is called in requests to push to it
    epoch: str = ""
    ourselves: bool = False
    draining: bool = False
    gone: bool = False
    goodbyes: int = 0
    greeted: bool = False
    last_error: str = ""
    told: set[str] = field(default_factory=set)  # reasons that people have been told since it was last well
    chunk_bytes: int = 0  # of one of its chunks, roughly
    disk: bool = False  # it has one
    disk_told: float = 0.0  # bytes per second at which it says that its disk gives
    speeds: list[float] = field(default_factory=lambda: [FIRST_SPEED, 0.0])  # seen, by place; 0: nothing seen yet
    breaker: Breaker = field(default_factory=lambda: Breaker(CAREFUL))

    def state(self, now: float) -> str:
        if self.ourselves:
            return "self"
        if self.breaker.state(now) != CLOSED:
            return "down"
        if self.gone:
            return "gone"
        if not self.greeted:
            return "joining"
        return "draining" if self.draining else "up"

    def gives(self, now: float) -> bool:
        """Whether chunks may be asked of it."""
        return self.state(now) in ("up", "draining")

    def takes(self, now: float) -> bool:
        """Whether chunks may be sent to it. One that has not answered yet may: the attempt decides."""
        return self.state(now) in ("up", "joining")

    def goodbye(self) -> None:
        self.gone = True
        self.goodbyes += 1

    def speed(self, place: int = MEMORY) -> float:
        """Bytes per second that it is expected to send from there; from its disk no faster than over the link."""
        link = self.speeds[MEMORY]
        return link if place == MEMORY else min(link, self.speeds[DISK] or self.disk_told or FIRST_SPEED)

    def observed(self, nbytes: int, seconds: float, place: int = MEMORY) -> None:
        """So much came from it in that time. What is averaged is the time for a byte: that is what predictions need."""
        if nbytes > 0:
            self.speeds[place] = 1 / ((1 - _WEIGHT) / self.speed(place) + _WEIGHT * max(seconds, 1e-4) / nbytes)

    def at_least(self, nbytes: int, seconds: float) -> None:
        """A single chunk came in that time, by its own will: the link can do that much, and perhaps more."""
        self.speeds[MEMORY] = max(self.speeds[MEMORY], nbytes / max(seconds, 1e-3))

    def too_slow(self, place: int = MEMORY) -> None:
        """What was asked of it did not come in time."""
        self.speeds[place] = max(1e4, self.speed(place) / 2)

    def second_chance(self, place: int) -> None:
        """It was not asked because it is slow: a speed that was once seen low must not stay so for ever."""
        self.speeds[place] = 1.05 * self.speed(place)

    def failed(self, ticket: int | None, now: float, why: str) -> None:
        self.last_error = why
        if ticket is not None:
            self.breaker.failure(ticket, now)

    def is_news(self, why: str) -> bool:
        if why in self.told or len(self.told) >= MOST_TOLD:
            return False
        self.told.add(why)
        return True

    def greeting(self, name: str, epoch: str) -> bool:
        """What it says of itself; True when this is another start than the one known before."""
        anew = bool(self.epoch) and self.epoch != epoch
        self.name, self.epoch, self.greeted, self.gone, self.draining = name or self.name, epoch, True, False, False
        self.told.clear()
        return anew


class Members:
    """All that are or were lately listed. `own` is the URL at which we listen ourselves."""

    def __init__(self, own: str = "", epoch: str = "") -> None:
        self._own, self._epoch = own, epoch
        self._members: dict[str, Member] = {}

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def __len__(self) -> int:
        return len(self._members)

    def others(self) -> list[Member]:
        return [m for m in self._members.values() if not m.ourselves]

    def get(self, url: str) -> Member | None:
        return self._members.get(url)

    def find(self, target: str) -> Member | None:
        """By name, by URL, or by the address in it; never ourselves."""
        if target in self._members:
            found: Member | None = self._members[target]
        else:
            found = next((m for m in self._members.values() if target == m.name or target in m.aliases), None)
            found = found or next((m for m in self._members.values() if urlsplit(m.url).hostname == target), None)
        return None if found is None or found.ourselves else found

    def listed(self, now_listed: dict[str, str]) -> tuple[list[Member], list[Member]]:
        """The sources' present list, URL -> name ("" where they know none). Returns (new ones, those that are off it)."""
        left = [m for url, m in self._members.items() if url not in now_listed]
        for member in left:
            del self._members[member.url]
        joined = [_member(url, names, self._own) for url, names in now_listed.items() if url not in self._members]
        self._members |= {member.url: member for member in joined}
        return [m for m in joined if not m.ourselves], [m for m in left if not m.ourselves]

    def greeted(self, member: Member, name: str, epoch: str) -> bool:
        """As Member.greeting; finds out when a listed address is our own."""
        if epoch == self._epoch:
            member.ourselves = True
            return False
        return member.greeting(name, epoch)


def _member(url: str, names: str, own: str) -> Member:
    """`names`: its name and further ones, with commas."""
    name, *aliases = names.split(",")
    return Member(url, name, tuple(aliases), ourselves=url == own)

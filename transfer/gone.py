"""What became of keys that are not here any more, and where those that came back came from: two bounded memories.

Pure; times are unix time and handed in. The daemon's loop owns it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

#: keys remembered; about 300 bytes each
MOST = 32768
_KEY = 16  # bytes of a key that are kept: enough to tell keys apart


class Removal(NamedTuple):
    """`reason`: capacity, dropped, cleared, corrupt; or why a lower tier did not give it: error, late, gone, no_room."""

    at: float
    tier: str
    reason: str
    by: str  # for whom the room was made; "" where for nobody


class Arrival(NamedTuple):
    """A chunk that was brought up from a lower tier."""

    at: float
    tier: str
    seconds: float
    nbytes: int


class Gone:
    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._removals: OrderedDict[bytes, tuple[Removal, ...]] = OrderedDict()
        self._arrivals: OrderedDict[bytes, Arrival] = OrderedDict()
        #: the client whose reservation is being carried out: what is evicted meanwhile makes room for it
        self.making_room_for = ""
        self.forgotten = False  # there have been more than could be remembered

    def __len__(self) -> int:
        return len(self._removals) + len(self._arrivals)

    def removed(self, key: bytes, tier: str, reason: str, now: float) -> None:
        by = self.making_room_for if reason == "capacity" else ""
        before = self._removals.pop(key[:_KEY], ())
        self._removals[key[:_KEY]] = (*before[-1:], Removal(now, tier, reason, by))
        while len(self._removals) > self._most:
            self._removals.popitem(last=False)
            self.forgotten = True

    def arrived(self, key: bytes, tier: str, seconds: float, nbytes: int, now: float) -> None:
        self._arrivals.pop(key[:_KEY], None)
        self._arrivals[key[:_KEY]] = Arrival(now, tier, seconds, nbytes)
        while len(self._arrivals) > self._most:
            self._arrivals.popitem(last=False)

    def removal(self, key: bytes, before: float) -> Removal | None:
        """The last that happened to it until then."""
        known = self._removals.get(key[:_KEY], ())
        return next((r for r in reversed(known) if r.at <= before), None)

    def arrival(self, key: bytes, since: float, until: float) -> Arrival | None:
        known = self._arrivals.get(key[:_KEY])
        return known if known is not None and since <= known.at <= until else None

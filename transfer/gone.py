"""What became of keys that are not here any more, and where those that came back came from: two bounded memories.

Pure; times are unix time and handed in. The daemon's loop owns it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

import msgspec

#: keys remembered; about 300 bytes each
MOST = 32768
_KEY = 16  # bytes of a key that are kept: enough to tell keys apart
#: keys to a dictionary. One that is full, and whose keys change, is rearranged now and then: a ms for ten thousand, in the
#: middle of somebody's request
_TOGETHER = 512


class Removal(msgspec.Struct, frozen=True, gc=False):
    """`reason`: capacity, dropped, cleared, corrupt; or why a lower tier did not give it: error, late, gone, no_room."""

    at: float
    tier: str
    reason: str
    by: str  # for whom the room was made; "" where for nobody
    before: Removal | None = None  # the last but one; it has none itself


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """A chunk that was brought up from a lower tier."""

    at: float
    tier: str
    seconds: float
    nbytes: int


_What = TypeVar("_What")


class _Latest(Generic[_What]):
    """What was said last of each of the last `most` keys, about; what is forgotten goes key by key."""

    def __init__(self, most: int) -> None:
        self._parts = [OrderedDict[bytes, _What]() for _ in range(max(1, most // _TOGETHER))]
        self._most = most // len(self._parts)
        self.forgotten = False  # there have been more than could be remembered

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def pop(self, key: bytes) -> _What | None:
        return self._part(key).pop(key[:_KEY], None)

    def put(self, key: bytes, what: _What) -> None:
        part = self._part(key)
        part[key[:_KEY]] = what
        if len(part) > self._most:
            part.popitem(last=False)
            self.forgotten = True

    def get(self, key: bytes) -> _What | None:
        return self._part(key).get(key[:_KEY])

    def _part(self, key: bytes) -> OrderedDict[bytes, _What]:
        return self._parts[hash(key[:_KEY]) % len(self._parts)]


class Gone:
    def __init__(self, most: int = MOST) -> None:
        self._removals = _Latest[Removal](most)
        self._arrivals = _Latest[Arrival](most)
        #: the client whose reservation is being carried out: what is evicted meanwhile makes room for it
        self.making_room_for = ""

    def __len__(self) -> int:
        return len(self._removals) + len(self._arrivals)

    @property
    def forgotten(self) -> bool:
        """Whether there have been more than could be remembered."""
        return self._removals.forgotten

    def removed(self, key: bytes, tier: str, reason: str, now: float) -> None:
        by = self.making_room_for if reason == "capacity" else ""
        last = self._removals.pop(key)
        if last is not None and last.before is not None:
            last = msgspec.structs.replace(last, before=None)
        self._removals.put(key, Removal(now, tier, reason, by, last))

    def arrived(self, key: bytes, tier: str, seconds: float, nbytes: int, now: float) -> None:
        self._arrivals.pop(key)
        self._arrivals.put(key, Arrival(now, tier, seconds, nbytes))

    def removal(self, key: bytes, before: float) -> Removal | None:
        """The last that happened to it until then."""
        known = self._removals.get(key)
        while known is not None and known.at > before:
            known = known.before
        return known

    def arrival(self, key: bytes, since: float, until: float) -> Arrival | None:
        known = self._arrivals.get(key)
        return known if known is not None and since <= known.at <= until else None

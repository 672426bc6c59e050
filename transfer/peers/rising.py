"""Chunks that peers asked for and that are on this host's disk: they come up a few at a time and are sent when they are here.

Pure: time is handed in. Nothing of it holds memory; a key is forgotten when it has come, has failed, or nobody waits any more.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice

#: keys that are waited for, all peers together
MAX_RISING = 1 << 14


@dataclass
class _Wish:
    targets: dict[str, float] = field(default_factory=dict)  # who waits, until when
    begun: bool = False


class Rising:
    def __init__(self, limit: int = MAX_RISING) -> None:
        self._limit = limit
        self._wishes: OrderedDict[bytes, _Wish] = OrderedDict()
        self.begun = 0

    def __len__(self) -> int:
        return len(self._wishes)

    def add(self, key: bytes, target: str, ends: float) -> bool:
        """False when there is no room for more."""
        if key not in self._wishes and len(self._wishes) >= self._limit:
            return False
        self._wishes.setdefault(key, _Wish()).targets[target] = ends
        return True

    def waiting(self, most: int) -> list[bytes]:
        """Those that nobody has begun to bring up, the longest asked for first."""
        return list(islice((key for key, wish in self._wishes.items() if not wish.begun), most))

    def begin(self, key: bytes) -> None:
        self._wishes[key].begun = True
        self.begun += 1

    def take(self, key: bytes) -> list[str]:
        """It is here, or will not come: who waits for it."""
        wish = self._wishes.pop(key, None)
        if wish is None:
            return []
        self.begun -= wish.begun
        return list(wish.targets)

    def forget(self, target: str) -> None:
        """That peer has left."""
        for key, wish in list(self._wishes.items()):
            wish.targets.pop(target, None)
            if not wish.targets:
                self.take(key)

    def expire(self, now: float) -> None:
        for key, wish in list(self._wishes.items()):
            wish.targets = {target: ends for target, ends in wish.targets.items() if ends > now}
            if not wish.targets:
                self.take(key)

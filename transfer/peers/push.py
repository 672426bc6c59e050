"""Which chunk goes to which peer once it is there, and what waits to be sent. Pure; the daemon's loop owns both.

An engine that computes a prompt for another host says at the start which keys it will make and for whom. Each is sent as
it commits, so that only the last one is still on its way when the prefill ends.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from pdserve.transfer.resident import Chunk

#: keys that are waited for, all peers together
MAX_WANTED = 1 << 16
#: a key that was announced and does not come is forgotten after so long
WANTED_S = 600.0


class Wanted:
    """Keys that peers shall get when they are committed here."""

    def __init__(self, limit: int = MAX_WANTED, seconds: float = WANTED_S) -> None:
        self._limit, self._seconds = limit, seconds
        self._keys: OrderedDict[tuple[bytes, str], float] = OrderedDict()
        self._targets: dict[bytes, list[str]] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: bytes, target: str, now: float) -> bool:
        """False when there is no room for more."""
        pair = (key, target)
        if pair not in self._keys:
            if len(self._keys) >= self._limit:
                return False
            self._targets.setdefault(key, []).append(target)
        self._keys[pair] = now + self._seconds
        self._keys.move_to_end(pair)
        return True

    def take(self, key: bytes) -> list[str]:
        """It is here: who wants it."""
        targets = self._targets.pop(key, [])
        for target in targets:
            del self._keys[key, target]
        return targets

    def forget(self, target: str) -> None:
        """That peer has left."""
        for key, _ in [pair for pair in self._keys if pair[1] == target]:
            self._drop(key, target)

    def expire(self, now: float) -> int:
        """Forgets what did not come; returns how many."""
        count = 0
        while self._keys:
            (key, target), ends = next(iter(self._keys.items()))
            if ends > now:
                break
            self._drop(key, target)
            count += 1
        return count

    def _drop(self, key: bytes, target: str) -> None:
        del self._keys[key, target]
        left = [t for t in self._targets[key] if t != target]
        if left:
            self._targets[key] = left
        else:
            del self._targets[key]


@dataclass
class Outbox:
    """Chunks that wait to be sent to one peer; the caller holds them in the store. First in, first out."""

    waiting: deque[Chunk] = field(default_factory=deque)
    nbytes: int = 0
    keys: set[bytes] = field(default_factory=set)  # waiting or being sent

    def add(self, chunk: Chunk) -> bool:
        """False when it is on its way already."""
        if chunk.key in self.keys:
            return False
        self.keys.add(chunk.key)
        self.waiting.append(chunk)
        self.nbytes += chunk.size
        return True

    def take(self, max_bytes: int) -> list[Chunk]:
        """What is sent next, together: at least one if any waits. done() is due for each afterwards."""
        batch: list[Chunk] = []
        size = 0
        while self.waiting and (not batch or size + self.waiting[0].size <= max_bytes):
            batch.append(self.waiting.popleft())
            size += batch[-1].size
        return batch

    def done(self, chunk: Chunk) -> None:
        self.nbytes -= chunk.size
        self.keys.discard(chunk.key)

    def clear(self) -> list[Chunk]:
        """Everything that waits is given up; what is being sent is not."""
        dropped = list(self.waiting)
        self.waiting.clear()
        for chunk in dropped:
            self.done(chunk)
        return dropped

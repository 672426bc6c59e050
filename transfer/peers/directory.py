"""Which peer holds which chunk. Pure: messages in, answers out.

EventLog is the speaking side: it numbers what comes and goes here and answers from any number on; who is too far behind,
or knows an earlier start of this daemon, gets everything anew, in parts. Directory is the listening side: whatever does
not follow without a gap on what it has makes it forget that peer and begin again, so an entry is never older than the
peer's present start. There is a pair of them for memory and one for disk.

A directory may be wrong for a moment in both directions; whoever relies on it finds out and computes. Keys are kept as
their first eight bytes: keys are hashes, so that two meet about once in 2**64/n.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from pdserve.transfer.peers.messages import MAX_KEYS, MEMORY, Changes, Page, Sync

#: changes that are kept to be told; who is further behind starts anew
LOG_LENGTH = 1 << 16
#: keys that are remembered of one peer: 32 MB
PEER_KEYS = 1 << 22
_EMPTY = np.empty(0, np.uint64)


def short(key: bytes) -> int:
    return int.from_bytes(key[:8], "little")


def shorts(keys: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(key[:8] for key in keys), np.uint64)


class KeySet:
    """64-bit numbers at about eight bytes each: a sorted array, and sets of what came and went since it was sorted."""

    def __init__(self) -> None:
        self._sorted = _EMPTY
        self._new: set[int] = set()
        self._gone: set[int] = set()

    def __len__(self) -> int:
        return self._sorted.size - len(self._gone) + len(self._new)

    def update(self, added: np.ndarray, removed: np.ndarray) -> None:
        for value in removed[self._among(removed)].tolist():
            self._gone.add(value)
        self._new.difference_update(removed.tolist())
        known = self._among(added)
        self._gone.difference_update(added[known].tolist())
        self._new.update(added[~known].tolist())
        if len(self._new) + len(self._gone) > max(4096, self._sorted.size // 16):
            self._merge()

    def contains(self, values: np.ndarray) -> np.ndarray:
        found = self._among(values)
        if self._new or self._gone:
            for i, value in enumerate(values.tolist()):
                found[i] = value in self._new or (found[i] and value not in self._gone)
        return found

    def array(self) -> np.ndarray:
        """All of them, sorted."""
        self._merge()
        return self._sorted

    def _among(self, values: np.ndarray) -> np.ndarray:
        if not self._sorted.size:
            return np.zeros(values.size, bool)
        at = np.searchsorted(self._sorted, values)
        found: np.ndarray = self._sorted[np.minimum(at, self._sorted.size - 1)] == values
        return found

    def _merge(self) -> None:
        if not self._new and not self._gone:
            return
        kept = self._sorted
        if self._gone:
            kept = np.setdiff1d(kept, np.fromiter(self._gone, np.uint64, len(self._gone)), assume_unique=True)
        if self._new:
            kept = np.union1d(kept, np.fromiter(self._new, np.uint64, len(self._new)))
        self._sorted, self._new, self._gone = kept, set(), set()


class EventLog:
    """What this daemon tells of itself. `epoch` is new at every start of it."""

    def __init__(self, epoch: str, length: int = LOG_LENGTH) -> None:
        self.epoch, self.seq = epoch, 0
        self._events: deque[tuple[int, bool]] = deque(maxlen=length)
        self._present = KeySet()
        self._waiting: dict[int, bool] = {}

    def begin(self, values: np.ndarray) -> None:
        """These were here before anybody could ask, so they are no events."""
        self._present.update(values, _EMPTY)

    def note(self, value: int, here: bool) -> None:
        """short(key) is here now, or is not any more."""
        self.seq += 1
        self._events.append((value, here))
        self._waiting[value] = here
        if len(self._waiting) >= 4096:
            self._settle()

    def _settle(self) -> None:
        added = [v for v, here in self._waiting.items() if here]
        removed = [v for v, here in self._waiting.items() if not here]
        self._present.update(np.array(added, np.uint64), np.array(removed, np.uint64))
        self._waiting.clear()

    def answer(self, ask: Sync, draining: bool = False, chunk_bytes: int = 0, speed: int = 0) -> Changes | Page:
        behind = self.seq - ask.seq
        if ask.cursor >= 0 or ask.epoch != self.epoch or not 0 <= behind <= len(self._events):
            # From where it says only if that was a part of this start's; else from the beginning.
            cursor = min(max(ask.cursor, 0), 2**64 - 1) if ask.epoch == self.epoch else 0
            return self._page(cursor, draining, chunk_bytes, speed)
        count = min(behind, MAX_KEYS)
        start = len(self._events) - behind
        last: dict[int, bool] = {}
        for i in range(start, start + count):
            value, here = self._events[i]
            last[value] = here
        return Changes(
            self.epoch, ask.seq, ask.seq + count,
            np.array([v for v, here in last.items() if here], np.uint64).tobytes(),
            np.array([v for v, here in last.items() if not here], np.uint64).tobytes(),
            draining, chunk_bytes, speed,
        )  # fmt: skip

    def _page(self, cursor: int, draining: bool, chunk_bytes: int, speed: int) -> Page:
        self._settle()
        everything = self._present.array()
        start = int(np.searchsorted(everything, np.uint64(cursor)))
        part = everything[start : start + MAX_KEYS]
        following = int(everything[start + MAX_KEYS]) if everything.size > start + MAX_KEYS else -1
        return Page(self.epoch, self.seq, cursor, part.tobytes(), following, draining, chunk_bytes, speed)


class _Known:
    """One peer as far as it has told. While `cursor` is not -1 the parts of everything are still coming."""

    def __init__(self) -> None:
        self.epoch, self.seq, self.cursor = "", 0, 0
        self.keys = KeySet()


class Directory:
    """Peers are named by whatever the caller names them by (their URL)."""

    def __init__(self, limit: int = PEER_KEYS, on_resync: Callable[[str], None] = lambda peer: None) -> None:
        self._limit, self._on_resync = limit, on_resync
        self._peers: dict[str, _Known] = {}

    def ask(self, peer: str, place: int = MEMORY) -> Sync:
        """What to ask that peer next."""
        known = self._peers.get(peer) or _Known()
        return Sync(known.epoch, known.seq, known.cursor, place)

    def take(self, peer: str, reply: Changes | Page) -> bool:
        """Its answer. True: ask again at once, there is more."""
        known = self._peers.setdefault(peer, _Known())
        if isinstance(reply, Changes):
            if reply.epoch != known.epoch or known.cursor >= 0 or reply.after != known.seq or reply.upto < reply.after:
                self._anew(peer)
                return True
            self._update(known, reply.added, reply.removed)
            known.seq = reply.upto
            return reply.upto - reply.after >= MAX_KEYS
        if reply.cursor == 0 and (known.epoch != reply.epoch or known.cursor != 0 or not known.epoch):
            if known.epoch:
                self._on_resync(peer)
            known = self._peers[peer] = _Known()
            known.epoch, known.seq = reply.epoch, reply.seq
        elif reply.epoch != known.epoch or reply.cursor != known.cursor:
            self._anew(peer)
            return True
        # Changes since the first part are asked for after the last one, so no part needs to be of the same moment.
        if reply.next >= 0 and reply.next <= reply.cursor:
            self._anew(peer)  # a peer whose parts do not advance would keep us asking for ever
            return False
        self._update(known, reply.keys, b"")
        known.cursor = reply.next
        return True

    def forget(self, peer: str) -> None:
        self._peers.pop(peer, None)

    def holds(self, peer: str, keys: np.ndarray) -> np.ndarray:
        """For each of shorts(keys): whether that peer says it has it."""
        known = self._peers.get(peer)
        return known.keys.contains(keys) if known else np.zeros(keys.size, bool)

    def size(self, peer: str) -> int:
        known = self._peers.get(peer)
        return len(known.keys) if known else 0

    def _anew(self, peer: str) -> None:
        self._peers[peer] = _Known()
        self._on_resync(peer)

    def _update(self, known: _Known, added: bytes, removed: bytes) -> None:
        # A cut-off number at the end would be a peer's mistake; what is whole still counts.
        new = np.frombuffer(added[: len(added) // 8 * 8], np.uint64)
        room = max(0, self._limit - len(known.keys))
        known.keys.update(new[:room], np.frombuffer(removed[: len(removed) // 8 * 8], np.uint64))

"""Who may write where: the receiving side's book of lent slots. Thread-safe, and the one place where the abort race is decided.

A slot is being written while at least one thread is inside it (between enter() and leave()). Ending a ticket only marks it:
the slot is finished when the last thread has left, and a thread that comes for an ended ticket gets no memory, so it throws its
bytes away. `finished` is called exactly once for each lent slot, outside the lock, on whichever thread was the last to leave.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from pdserve import kernels
from pdserve.errors import ProtocolError
from pdserve.kernels import receive
from pdserve.transfer.transports.base import ARRIVED, MAX_TICKETS, Outcome, Slot

Finished = Callable[[Slot, Outcome], None]


class _Entry:
    __slots__ = (
        "arrived",
        "deadline",
        "digest",
        "ended",
        "entered",
        "key",
        "parts",
        "segments",
        "shard",
        "slot",
        "writers",
    )

    def __init__(self, slot: Slot, key: bytes, shard: int, digest: int, deadline: float) -> None:
        self.slot, self.key, self.shard, self.digest, self.deadline = slot, key, shard, digest, deadline
        self.writers = 0
        self.entered = 0  # bytes that came or are coming
        self.arrived = 0
        self.parts: int | None = 0  # of the digest, added up; None: not all segments brought theirs
        self.segments: set[int] = set()
        self.ended: Outcome | None = None


class Ledger:
    """The lent slots of one connection."""

    def __init__(self, arena: np.ndarray, finished: Finished, *, verify: bool = True) -> None:
        self._arena = arena
        self._memory = memoryview(arena)
        self._finished = finished
        self.verify = verify
        self._lock = threading.Lock()
        self._open: dict[int, _Entry] = {}
        self._last = 0
        self._closed: Outcome | None = None

    def __len__(self) -> int:
        return len(self._open)

    def lend(self, slot: Slot, key: bytes, shard: int, digest: int, deadline: float) -> int:
        """Takes the slot in and returns its ticket. Raises ProtocolError when it cannot be taken; then it was not lent."""
        if slot.length <= 0 or slot.offset < 0 or slot.offset + slot.length > self._arena.size:
            raise ProtocolError(f"a slot of {slot.length} bytes at {slot.offset} is not in the arena")
        with self._lock:
            if self._closed is not None:
                raise ProtocolError(f"no slot can be lent any more: {self._closed.reason}")
            if len(self._open) >= MAX_TICKETS:
                raise ProtocolError(f"{MAX_TICKETS} slots are lent already")
            self._last += 1
            slot.ticket = self._last
            self._open[self._last] = _Entry(slot, key, shard, digest, deadline)
            return self._last

    def length_of(self, ticket: int) -> int:
        """Bytes of an open ticket's slot, 0 when it has ended."""
        entry = self._open.get(ticket)
        return 0 if entry is None else entry.slot.length

    def enter(
        self, ticket: int, key: bytes, shard: int, total: int, offset: int, length: int, digest: int = 0
    ) -> memoryview | None:
        """Where these bytes go; None: nowhere, the ticket has ended. Whoever got memory calls leave() for it.

        Raises ProtocolError when they cannot belong there: the peer is not to be trusted any further.
        """
        with self._lock:
            entry = self._open.get(ticket)
            if entry is None or entry.ended is not None:
                if not 0 < ticket <= self._last:
                    raise ProtocolError(f"bytes for ticket {ticket}, which was never given out")
                return None
            self._check(entry, key, shard, total, offset, length)
            if digest and not entry.digest:
                entry.digest = digest
            entry.segments.add(offset)
            entry.entered += length
            entry.writers += 1
            start = entry.slot.offset + offset
            return self._memory[start : start + length]

    @staticmethod
    def _check(entry: _Entry, key: bytes, shard: int, total: int, offset: int, length: int) -> None:
        if key != entry.key or shard != entry.shard or total != entry.slot.length:
            raise ProtocolError(f"ticket {entry.slot.ticket} is for another piece than the one that came")
        if length <= 0 or offset < 0 or offset + length > total:
            raise ProtocolError(f"{length} bytes at {offset} do not fit into a piece of {total}")
        if offset in entry.segments or entry.entered + length > total:
            raise ProtocolError(f"bytes at {offset} of ticket {entry.slot.ticket} came twice")

    def word_of(self, offset: int, length: int, total: int) -> int | None:
        """Where this segment's words begin in its piece, for a part of the digest; None: no part of it is wanted."""
        if not self.verify or offset % 8 or (length % 8 and offset + length != total):
            return None
        return offset // 8

    def leave(self, ticket: int, length: int, failed: Outcome | None = None, part: int | None = None) -> None:
        """The thread has left the slot for good; `length` bytes of its segment are there, unless it failed.

        `part`: of the piece's digest (kernels.receive). When all segments bring theirs, the piece is not read once more for it.
        """
        with self._lock:
            entry = self._open[ticket]
            if part is None or entry.parts is None:
                entry.parts = None
            else:
                entry.parts += part
            if failed is not None and entry.ended is None:
                entry.ended = failed
            entry.arrived += length
            complete = entry.ended is None and entry.arrived == entry.slot.length
            if not complete:
                entry.writers -= 1
                if entry.writers or entry.ended is None:
                    return
                del self._open[ticket]
        if complete:  # this thread is still counted as a writer, so the slot stays while its bytes are read
            outcome = self._verified(entry)
            with self._lock:
                entry.writers -= 1
                entry.ended = entry.ended or outcome
                del self._open[ticket]
        assert entry.ended is not None
        self._finished(entry.slot, entry.ended)

    def _verified(self, entry: _Entry) -> Outcome:
        if not self.verify or not entry.digest:
            return ARRIVED
        start, length, parts = entry.slot.offset, entry.slot.length, entry.parts
        found = kernels.digest(self._arena[start : start + length]) if parts is None else receive.finish(parts, length)
        if found == entry.digest:
            return ARRIVED
        return Outcome("corrupt", f"the digest is {found:016x}, not {entry.digest:016x} as announced")

    def wanted(self, ticket: int) -> bool:
        """Whether its bytes are still of use: a thread in a slot looks now and then."""
        entry = self._open.get(ticket)
        return entry is not None and entry.ended is None

    def end(self, tickets: list[int], outcome: Outcome) -> None:
        """These get no more bytes. finished() follows: at once where nobody writes, else when the last has left."""
        over: list[_Entry] = []
        with self._lock:
            for ticket in tickets:
                entry = self._open.get(ticket)
                if entry is None or entry.ended is not None:
                    continue
                entry.ended = outcome
                if not entry.writers:
                    over.append(self._open.pop(ticket))
        for entry in over:
            self._finished(entry.slot, outcome)

    def expired(self, now: float) -> list[int]:
        """Open tickets whose deadline has passed."""
        with self._lock:
            return [ticket for ticket, entry in self._open.items() if entry.deadline < now and entry.ended is None]

    def lingering(self, tickets: list[int]) -> bool:
        """Whether somebody is still inside one of these although it has ended."""
        with self._lock:
            entries = [self._open.get(ticket) for ticket in tickets]
            return any(entry is not None and entry.ended is not None for entry in entries)

    def close(self, outcome: Outcome) -> None:
        """Ends all tickets, and no slot is taken in any more."""
        with self._lock:
            self._closed = outcome
            tickets = list(self._open)
        self.end(tickets, outcome)

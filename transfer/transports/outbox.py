"""What waits to be sent: pieces cut into segments, handed to whichever stream is free, no more than the receiver gave credit for.

Thread-safe. A segment that a thread has taken is in its hands until gone(): as long as one of a parcel's segments is, the arena
under it is being read, and push() does not return.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pdserve.transfer.transports.base import Piece


class Segment(NamedTuple):
    """A part of a piece: one frame on one stream."""

    ticket: int
    piece: Piece
    #: within the piece
    start: int
    length: int
    parcel: Parcel


class Parcel:
    """The pieces of one push(). `idle` is called, on any thread, whenever nothing of it is in anybody's hands any more."""

    __slots__ = ("idle", "in_hand", "withdrawn")

    def __init__(self, idle: Callable[[], None]) -> None:
        self.idle = idle
        self.in_hand = 0
        self.withdrawn = False


class Outbox:
    """One connection's. `segment_bytes` cuts the pieces; `credit` is what the receiver allows to begin with."""

    def __init__(self, segment_bytes: int, credit: int) -> None:
        assert 0 < segment_bytes <= credit
        self._segment_bytes = segment_bytes
        self._ready = threading.Condition()
        self._waiting: deque[Segment] = deque()
        self._ended: set[int] = set()
        self._credit = credit
        self._closed = False
        self.queued_bytes = 0
        #: told, on any thread, that take() may find something now; for senders that do not wait in take()
        self.on_ready: Callable[[], None] = lambda: None

    @property
    def credit(self) -> int:
        return self._credit

    @property
    def closed(self) -> bool:
        return self._closed

    def put(self, pieces: Sequence[tuple[int, Piece]], parcel: Parcel) -> None:
        size = self._segment_bytes
        segments = [
            Segment(ticket, piece, start, min(size, piece.length - start), parcel)
            for ticket, piece in pieces
            for start in range(0, piece.length, size)
        ]
        with self._ready:
            self._waiting.extend(segments)
            self.queued_bytes += sum(s.length for s in segments)
            self._ready.notify_all()
        self.on_ready()

    def take(self, most_bytes: int, most: int, timeout: float) -> list[Segment]:
        """Segments to send now, at most that many and (beyond the first) that many bytes. Empty: nothing in time."""
        ends = time.monotonic() + timeout
        with self._ready:
            while not self._closed:
                taken = self._taken(most_bytes, most)
                if taken:
                    return taken
                left = ends - time.monotonic()
                if left <= 0 or not self._ready.wait(left):
                    break
            return []

    def _taken(self, most_bytes: int, most: int) -> list[Segment]:
        taken: list[Segment] = []
        size = 0
        while self._waiting and len(taken) < most:
            segment = self._waiting[0]
            if segment.parcel.withdrawn or segment.ticket in self._ended:
                self._drop()
                continue
            if segment.length > self._credit or (taken and size + segment.length > most_bytes):
                break
            self._drop()
            self._credit -= segment.length
            segment.parcel.in_hand += 1
            size += segment.length
            taken.append(segment)
        return taken

    def _drop(self) -> None:
        self.queued_bytes -= self._waiting.popleft().length

    def gone(self, segments: Sequence[Segment]) -> None:
        """The thread reads none of them any more."""
        idle: list[Parcel] = []
        with self._ready:
            for segment in segments:
                segment.parcel.in_hand -= 1
                if not segment.parcel.in_hand:
                    idle.append(segment.parcel)
        for parcel in idle:
            parcel.idle()

    def wanted(self, segment: Segment) -> bool:
        """Whether it still makes sense to send it."""
        return not (self._closed or segment.parcel.withdrawn or segment.ticket in self._ended)

    def withdraw(self, parcel: Parcel) -> None:
        """What of it is not in somebody's hands is not sent any more."""
        with self._ready:
            parcel.withdrawn = True

    def end(self, tickets: Sequence[int]) -> None:
        """The receiver does not want these any more. forget() once their push is over."""
        with self._ready:
            self._ended.update(tickets)

    def forget(self, tickets: Sequence[int]) -> None:
        with self._ready:
            self._ended.difference_update(tickets)

    def add_credit(self, size: int) -> None:
        with self._ready:
            self._credit += size
            self._ready.notify_all()
        self.on_ready()

    def close(self) -> None:
        with self._ready:
            self._closed = True
            self._waiting.clear()
            self.queued_bytes = 0
            self._ready.notify_all()
        self.on_ready()

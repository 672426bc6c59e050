"""A circuit breaker per tier: a store that fails again and again is left alone, and asked now and then whether it is back.

    closed      every call goes through; `failures` failures in a row open the circuit
    open        no call goes through for a while: `first_pause` seconds, doubled each time the probe fails, up to `longest_pause`
    half-open   one call goes through, the probe; its success closes the circuit, its failure opens it again

Breaker is pure: time is handed in. Guarded is a Tier that puts a breaker and deadlines around another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import msgspec
import numpy as np

from pdserve.transfer.tiers.base import ChunkRecord, CorruptChunk, Tier, TierError

T = TypeVar("T")

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half_open"


class CircuitOpen(TierError):
    """Not tried: the tier failed too often. The text names its last error and when it is tried again."""


class BreakerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    failures: int = 5
    first_pause: float = 1.0
    longest_pause: float = 60.0
    #: a probe of which nothing is heard for so long counts as failed
    probe_patience: float = 30.0


class Breaker:
    """Counts; the caller asks allow() before a call and reports with the ticket it got. Not thread-safe."""

    def __init__(self, options: BreakerOptions | None = None) -> None:
        self._options = options or BreakerOptions()
        self._row = 0
        self._pause = self._options.first_pause
        self._until = 0.0
        self._state = CLOSED
        self._probe_began = 0.0
        #: what began before the last change of state says nothing about the present one
        self._era = 0

    def state(self, now: float) -> str:
        """closed, open or half_open: what a call that came now would find."""
        if self._state == OPEN and now >= self._until:
            return HALF_OPEN
        return self._state

    def next_try(self, now: float) -> float:
        """Seconds until a call would be let through; 0 when one would be now."""
        if self._state == OPEN:
            return max(0.0, self._until - now)
        if self._state == HALF_OPEN:
            return max(0.0, self._probe_began + self._options.probe_patience - now)
        return 0.0

    def allow(self, now: float) -> int | None:
        """A ticket for one call, or None when it must not be made."""
        if self._state == HALF_OPEN and now - self._probe_began >= self._options.probe_patience:
            self._open(now)
        if self._state == OPEN and now >= self._until:
            self._change(HALF_OPEN)
            self._probe_began = now
            return self._era
        return self._era if self._state == CLOSED else None

    def success(self, ticket: int) -> None:
        if ticket != self._era:
            return
        self._row = 0
        if self._state == HALF_OPEN:
            self._pause = self._options.first_pause
            self._change(CLOSED)

    def failure(self, ticket: int, now: float) -> None:
        if ticket != self._era:
            return
        self._row += 1
        if self._state == HALF_OPEN or self._row >= self._options.failures:
            self._open(now)

    def _open(self, now: float) -> None:
        if self._state == HALF_OPEN:
            self._pause = min(self._pause * 2, self._options.longest_pause)
        self._until = now + self._pause
        self._change(OPEN)

    def _change(self, state: str) -> None:
        self._state, self._row = state, 0
        self._era += 1


class Guarded:
    """A tier behind a breaker, with an upper bound on what one get() or put() may take.

    A miss or a refused put is an answer like another; every TierError counts as a failure but for CorruptChunk: whoever
    sends wrong bytes is there. `clock` is what deadlines are in, time.monotonic.
    """

    def __init__(
        self,
        tier: Tier,
        *,
        get_timeout: float = 10.0,
        put_timeout: float = 60.0,
        options: BreakerOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = tier.name
        self.tier = tier
        self._get_timeout, self._put_timeout = get_timeout, put_timeout
        self._breaker = Breaker(options)
        self._clock = clock
        self._lock = threading.Lock()
        self._last_error = ""

    def register(self, arena: np.ndarray) -> None:
        """Shows the tier the memory that chunks lie in, should it want to know."""
        register = getattr(self.tier, "register", None)
        if register is not None:
            register(arena)

    def contains(self, keys: list[bytes]) -> list[ChunkRecord | None]:
        with self._guard():
            return self.tier.contains(keys)

    def get(self, record: ChunkRecord, into: list[np.ndarray], deadline: float) -> bool:
        with self._guard():
            return self.tier.get(record, into, min(deadline, self._clock() + self._get_timeout))

    def put(self, record: ChunkRecord, payload: list[np.ndarray], deadline: float) -> bool:
        with self._guard():
            return self.tier.put(record, payload, min(deadline, self._clock() + self._put_timeout))

    def delete(self, keys: list[bytes]) -> int:
        with self._guard():
            return self.tier.delete(keys)

    def listing(self, deadline: float) -> Iterator[ChunkRecord] | None:
        """See base.Tier; None where the tier cannot list. Not counted: it is no part of serving."""
        listing = getattr(self.tier, "listing", None)
        found: Iterator[ChunkRecord] | None = None if listing is None else listing(deadline)
        return found

    def stats(self) -> dict[str, int | float | str]:
        """Those of the tier; `circuit` is the breaker's state, and while it is not closed `state` is the last error."""
        stats = dict(self.tier.stats())
        with self._lock:
            stats["circuit"] = self._breaker.state(self._clock())
            if stats["circuit"] != CLOSED:
                stats["state"] = self._last_error
        return stats

    @property
    def left_alone(self) -> bool:
        """Not every call goes through at present."""
        with self._lock:
            return self._breaker.state(self._clock()) != CLOSED

    def close(self) -> None:
        self.tier.close()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        with self._lock:
            ticket = self._breaker.allow(self._clock())
            if ticket is None:
                wait = self._breaker.next_try(self._clock())
                raise CircuitOpen(f"{self.name}: left alone for {wait:.1f} s more after: {self._last_error}")
        try:
            yield
        except CorruptChunk:
            self._succeeded(ticket)
            raise
        except Exception as e:
            # Whatever it was, the ticket must come back: a probe that never reports keeps the circuit open.
            with self._lock:
                self._last_error = str(e) or type(e).__name__
                self._breaker.failure(ticket, self._clock())
            raise
        self._succeeded(ticket)

    def _succeeded(self, ticket: int) -> None:
        with self._lock:
            self._breaker.success(ticket)

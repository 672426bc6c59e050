"""One timer for many waits: set for the earliest of their deadlines, however many waits begin and end before it.

Nearly every wait ends well long before its deadline. A timer of its own would be made and cancelled for each; here a wait
costs an entry, and the timer looks at all of them when it goes off.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol


class Waits(Protocol):
    def overdue(self, now: float) -> float | None:
        """Its deadline has come: ends the wait, or says until when it may go on."""


class Watch:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: dict[Waits, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._at = math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, one: Waits, until: float) -> None:
        """Times are the loop's."""
        self._waiting[one] = until
        if until < self._at:
            self._set(until)

    def remove(self, one: Waits) -> None:
        self._waiting.pop(one, None)

    def _set(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._at, self._timer = at, self.loop.call_at(at, self._look)

    def _look(self) -> None:
        self._timer, self._at = None, math.inf
        now = self.loop.time()
        for one in [one for one, until in self._waiting.items() if until <= now]:
            if (until := one.overdue(now)) is None:
                self._waiting.pop(one, None)
            else:
                self._waiting[one] = until
        if self._waiting:
            self._set(max(now, min(self._waiting.values())))

"""How many streams to use: more help where one is held back (long ways, small windows), fewer cost less CPU. Pure.

Hill climbing with hysteresis. While there is more to send than fits, bytes and time are counted, over as many pushes as it takes
for a window of them: one push is often over sooner, and what lies between two is nobody's fault. After _SETTLED
windows one neighbour (one more, next time one fewer) is tried for _TRIED windows; it is kept when it was clearly faster, or, for
fewer, when it was not clearly slower. A trial that failed makes the next one come later, up to _RAREST windows.
"""

from __future__ import annotations

import threading

#: a window of measuring: at least so long and so many bytes
WINDOW_S = 0.05
WINDOW_BYTES = 32 << 20
#: what "clearly" means
GAIN = 1.10
_SETTLED = 6
_TRIED = 3
_RAREST = 96


class Tuner:
    """For one direction of one connection. Thread-safe; `count` may be read at any time."""

    def __init__(self, most: int, adapt: bool = True, start: int = 1) -> None:
        """`adapt` False: always all of them."""
        self._most, self._adapt = most, adapt
        self._lock = threading.Lock()
        self.count = min(start, most)
        self._home = self.count  # the count that trials are compared with
        self._step = 1
        self._rates: list[float] = []
        self._base = 0.0
        self._wait = _SETTLED
        #: when bytes were sent last, while others waited
        self._last: float | None = None
        self._bytes, self._seconds = 0, 0.0

    def allow(self, most: int) -> None:
        """There are so many streams now."""
        self._most = most
        if not self._adapt:
            self.count = most

    def sent(self, size: int, now: float, more: bool) -> None:
        """`size` bytes have been handed to the kernel; `more`: others were waiting, so streams are what holds it back."""
        if self._most == 1 or not self._adapt:
            return
        with self._lock:
            if self._last is not None:
                self._bytes += size
                self._seconds += max(0.0, now - self._last)  # threads come here in any order
            self._last = now if more else None
            if self._seconds >= WINDOW_S and self._bytes >= WINDOW_BYTES:
                self._judge(self._bytes / self._seconds)
                self._bytes, self._seconds = 0, 0.0

    def _judge(self, rate: float) -> None:
        self._rates.append(rate)
        if self.count == self._home:
            if len(self._rates) >= self._wait:
                self._base = _middle(self._rates)
                self._try_neighbour()
        elif len(self._rates) >= _TRIED:
            tried = _middle(self._rates)
            better = tried > self._base * GAIN if self.count > self._home else tried * GAIN > self._base
            if better:
                self._home, self._wait = self.count, _SETTLED
            else:
                self.count, self._step = self._home, -self._step
                self._wait = min(_RAREST, self._wait * 2)
            self._rates = []

    def _try_neighbour(self) -> None:
        self._rates = []
        wanted = self._home + self._step
        if not 1 <= wanted <= self._most:
            self._step = -self._step
            wanted = self._home + self._step
        if 1 <= wanted <= self._most:
            self.count = wanted


def _middle(rates: list[float]) -> float:
    return sorted(rates)[len(rates) // 2]

"""In which order requests get the loop's time: a few new ones a turn, so that those under way go first.

All that is ready is served in one turn of the loop. When a hundred requests arrive at once, every one of them would be
read and sent to a producer before the first reply is looked at: running streams would pause for as long, and engines
would have nothing to do, and then everything at once. With a few new ones a turn, each turn also takes what engines have
said meanwhile, and first answers are given while the last requests still begin.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

NEW = 8  # requests that may begin in one turn


class Turns:
    """Each turn begins some of those in the line: nobody waits longer than those before him take to begin."""

    def __init__(self, new: int = NEW) -> None:
        self._new = self._left = new
        self._line: deque[Callable[[], None]] = deque()
        self._turning = False

    def begin(self, loop: asyncio.AbstractEventLoop, start: Callable[[], None]) -> None:
        """Calls `start` now or in one of the loop's next turns, in the order in which they came."""
        if not self._turning:
            self._turning = True
            loop.call_soon(self._turn, loop)
        if self._left:
            self._left -= 1
            start()
        else:
            self._line.append(start)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = self._new
        self._turning = bool(self._line)
        if self._turning:
            loop.call_soon(self._turn, loop)  # before anything is started: what is started cannot keep it from coming
        while self._line and self._left:
            self._left -= 1
            self._line.popleft()()

"""The engine core's naps end when a load ends.

After a step that computes nothing, vLLM's engine core sleeps for a millisecond, so that other threads have Python's lock. So a load's
end is noticed late, and two more such steps follow before its request runs: the one that reports the load and, under
asynchronous scheduling, the one that takes the report in. Those naps are cut short, three for each load; all others stay.
"""

from __future__ import annotations

import importlib
import threading
import time
from typing import Any

#: naps that a load's end cuts short: the one under way, and one behind each step until its request's
NAPS = 3
#: what counts as a nap, in seconds
NAP_S = 0.002


class Clock:
    """Python's time module as the engine core sees it."""

    def __init__(self) -> None:
        self._awake, self._left = threading.Event(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def ended(self) -> None:
        """A load has ended, or its end is known to the scheduler. From any thread."""
        self._left = NAPS
        self._awake.set()

    def computed(self) -> None:
        """A step computes something: nobody waits for it to begin any more."""
        self._awake.clear()

    def sleep(self, seconds: float) -> None:
        if seconds > NAP_S:
            time.sleep(seconds)
        elif self._awake.wait(seconds):
            self._left -= 1
            if self._left <= 0:
                self._awake.clear()


clock = Clock()


def install() -> None:
    """In the engine core's process; more than once is once."""
    core: Any = importlib.import_module("vllm.v1.engine.core")
    if getattr(core, "time", None) is time:
        core.time = clock

"""Python's cyclic garbage collector, kept out of the requests' way.

A full collection looks at every object there is, and a cache holds several for each chunk: with 130,000 chunks one took
0.3 s, and they come most often while the cache fills. What the daemon keeps is in no cycles, so the young generation alone
is collected as Python sees fit, and all of it when nobody has asked for anything for a while, or at least now and then.
"""

from __future__ import annotations

import gc

QUIET_S, LONGEST_S = 5.0, 3600.0
_YOUNG, _NEVER = 500, 1 << 30


class Collector:
    """For a process of its own: what it sets is the interpreter's."""

    def __init__(self, now: float) -> None:
        self._last = self._asked = now
        self._count = 0
        gc.collect()
        gc.freeze()  # what was imported stays
        gc.set_threshold(_YOUNG, _NEVER, _NEVER)

    def tick(self, now: float, requests: int) -> bool:
        """`requests`: how many there were so far. Collects everything when it is time, and says so."""
        if requests != self._count:
            self._count, self._asked = requests, now
        worth = self._asked > self._last  # nothing has happened since the last time otherwise
        if not worth or (now - self._asked < QUIET_S and now - self._last < LONGEST_S):
            return False
        gc.collect()
        self._last = now
        return True

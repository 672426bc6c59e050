"""Which way gives the first token sooner: a prefill on a producer, or on the consumer alone. Pure; over measured times.

Each way keeps a straight line over the uncached tokens of its prompts (pace.py). The consumer alone is asked where its
line promises the first token clearly sooner, and where it disturbs nobody: answers that run on the consumer wait while
it prefills, so there it may take no longer than `STALL_S`. What is not asked any more would never be measured again:
now and then a request goes the other way.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.proxy.pace import Pace
from pdserve.proxy.policies.base import Candidate

LOCAL, PROBE = "quicker-local", "measuring"  # reasons for leaving the producers out
ENOUGH = 4  # first tokens measured on a way before its line counts
EXPLORE_EVERY = 4  # requests, until a way has them
PROBE_EVERY = 64  # requests, from then on
MARGIN = 0.9  # of the producers' way: what promises less than a tenth is not worth the change
STALL_S = 0.05


class Quicker:
    def __init__(self) -> None:
        self._split, self._local = Pace(), Pace()
        self._decided = 0

    def add(self, local: bool, uncached: float, seconds: float) -> None:
        """A first token came `seconds` after the decision."""
        (self._local if local else self._split).add(uncached, seconds)

    def why_not(
        self, split: float, local: float, producers: Sequence[Candidate], consumers: Sequence[Candidate]
    ) -> str:
        """The reason for leaving the producers out, or "". `split` and `local`: tokens to compute on either way."""
        self._decided += 1
        if self._split.count < ENOUGH:
            return ""
        idle = min(c.load for c in consumers) == 0
        if self._local.count < ENOUGH:
            return PROBE if idle and self._decided % EXPLORE_EVERY == 0 else ""
        here = self._local.seconds(local)
        there = self._split.seconds(split) * (1 + min(p.load for p in producers))  # prefills wait for each other
        sooner = here < MARGIN * there and (idle or here <= STALL_S)
        if self._decided % PROBE_EVERY == 0:
            return PROBE if idle and not sooner else ""
        return LOCAL if sooner else ""

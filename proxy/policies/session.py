"""Requests of one session go to one engine: consistent hashing with bounded load.

Every engine has POINTS places on a ring; a session belongs to the first engine behind its own place. An engine that
comes or goes moves only the sessions next to its places. One that already carries more than its share of what runs
(BOUND times the average) is passed over for this request, so that a heavy session does not pile up on one engine.
Requests without a session go to the least loaded.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b

from pdserve.proxy.policies import least_load
from pdserve.proxy.policies.base import C, Facts, Unlearning

POINTS = 64
BOUND = 1.25


def place(text: str) -> int:
    """The same in every process and on every day."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


class Policy(Unlearning):
    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._ring: list[tuple[int, int]] = []
        self._rest = least_load.Policy()

    def pick(self, facts: Facts, candidates: Sequence[C]) -> C:
        if not facts.session:
            return self._rest.pick(facts, candidates)
        names = tuple(candidate.name for candidate in candidates)
        if names != self._names:
            self._names = names
            self._ring = sorted((place(f"{name}#{n}"), i) for i, name in enumerate(names) for n in range(POINTS))
        most = math.ceil(BOUND * (sum(c.load for c in candidates) + 1) / len(candidates))
        start = bisect_right(self._ring, (place(facts.session), len(names)))
        for n in range(len(self._ring)):
            chosen = candidates[self._ring[(start + n) % len(self._ring)][1]]
            if chosen.load < most:
                return chosen
        raise AssertionError("not all can be above the average")

"""Two at random, the less loaded of them: nearly as even as least_load, and several proxies with the same stale view of
the load do not all run to the same engine."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pdserve.proxy.policies.base import C, Facts, Unlearning, idlest


class Policy(Unlearning):
    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def pick(self, facts: Facts, candidates: Sequence[C]) -> C:
        if len(candidates) <= 2:
            return idlest(candidates)
        return idlest(self._random.sample(candidates, 2))

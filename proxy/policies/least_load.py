"""The one with the fewest requests running; among equals each in turn, so that an idle fleet is used evenly."""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.proxy.policies.base import C, Facts


class Policy:
    def __init__(self) -> None:
        self._turn = 0

    def pick(self, facts: Facts, candidates: Sequence[C]) -> C:
        least = min(candidate.in_flight for candidate in candidates)
        idlest = [candidate for candidate in candidates if candidate.in_flight == least]
        chosen = idlest[self._turn % len(idlest)]
        self._turn += 1
        return chosen

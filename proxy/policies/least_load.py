"""The least loaded; among equals each in turn, so that an idle fleet is used evenly."""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.proxy.policies.base import C, Facts, Unlearning


class Policy(Unlearning):
    def __init__(self) -> None:
        self._turn = 0

    def pick(self, facts: Facts, candidates: Sequence[C]) -> C:
        least = min(candidate.load for candidate in candidates)
        idle = [candidate for candidate in candidates if candidate.load == least]
        chosen = idle[self._turn % len(idle)]
        self._turn += 1
        return chosen

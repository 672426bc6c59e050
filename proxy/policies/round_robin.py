"""Each in turn."""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.proxy.policies.base import C, Facts, Unlearning


class Policy(Unlearning):
    def __init__(self) -> None:
        self._turn = 0

    def pick(self, facts: Facts, candidates: Sequence[C]) -> C:
        chosen = candidates[self._turn % len(candidates)]
        self._turn += 1
        return chosen

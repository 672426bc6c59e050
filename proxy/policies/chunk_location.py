"""To where the prompt's chunks are, as engines' replies have told, weighed against how busy it is there.

An engine that has answered a prompt has its KV in its own memory, and the cache of its host has it too: a match on the
engine itself counts in full, one on its host by HOST_WORTH (the chunks must be loaded from there). A reply that says
that nothing was cached where a match had been believed takes the belief away: the chunks were dropped, or the engine
was restarted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pdserve.proxy.policies import least_load
from pdserve.proxy.policies.base import C, Candidate, Facts

REMEMBERED = 200_000
HOST_WORTH = 0.8
LOAD_COST = 2.0  # blocks that must match for one more running request to be worth it


class Policy:
    def __init__(self) -> None:
        self._where: OrderedDict[int, dict[str, str]] = OrderedDict()  # block -> names that have it, with their host
        self._rest = least_load.Policy()

    def pick(self, facts: Facts, candidates: Sequence[C]) -> C:
        scores = [self._score(facts, candidate) for candidate in candidates]
        best = max(scores)
        return self._rest.pick(facts, [c for c, score in zip(candidates, scores, strict=True) if score == best])

    def _score(self, facts: Facts, candidate: Candidate) -> float:
        own, host = self.matched(facts, candidate)
        return max(own, HOST_WORTH * host) - LOAD_COST * candidate.load

    def matched(self, facts: Facts, candidate: Candidate) -> tuple[int, int]:
        """Blocks of the prompt's beginning that the engine has, and that its host has."""
        own = host = 0
        for n, block in enumerate(facts.blocks, 1):
            holders = self._where.get(block, {})
            if candidate.name in holders:
                own = n
            if candidate.host in holders.values():
                host = n
        return own, host

    def learn(self, facts: Facts, candidate: Candidate, cached: int | None) -> None:
        if cached == 0:
            for block in facts.blocks:
                self._where.pop(block, None)
        for block in facts.blocks:
            self._where.setdefault(block, {})[candidate.name] = candidate.host
            self._where.move_to_end(block)
        while len(self._where) > REMEMBERED:
            self._where.popitem(last=False)

"""To where the prompt's chunks are, as engines' replies have told, weighed against how busy it is there.

An engine that has answered a prompt has its KV in its own memory, and the cache of its host has it too: a match on the
engine itself counts in full, one on its host by HOST_WORTH (the chunks must be loaded from there). A reply that says
that nothing was cached where a match had been believed takes the belief away. What caches hold now their daemons tell
(locating.py), and an engine or a daemon that begins a new life has nothing.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence

from pdserve.proxy.policies import least_load
from pdserve.proxy.policies.base import C, Candidate, Facts

REMEMBERED = 200_000
HOST_WORTH = 0.8
LOAD_COST = 2.0  # blocks that must match for one more running request to be worth it


class Policy:
    def __init__(self) -> None:
        # block -> who has it: engines as ("", name), caches as (host, ""); each with the life it was told in
        self._where: OrderedDict[int, dict[tuple[str, str], int]] = OrderedDict()
        self._lives: Counter[tuple[str, str]] = Counter()
        self._rest = least_load.Policy()

    def pick(self, facts: Facts, candidates: Sequence[C]) -> C:
        scores = [self._score(facts, candidate) for candidate in candidates]
        best = max(scores)
        return self._rest.pick(facts, [c for c, score in zip(candidates, scores, strict=True) if score == best])

    def _score(self, facts: Facts, candidate: Candidate) -> float:
        own, host = self.matched(facts, candidate)
        return max(own, HOST_WORTH * host) - LOAD_COST * candidate.load

    def matched(self, facts: Facts, candidate: Candidate) -> tuple[int, int]:
        """Blocks of the prompt's beginning that the engine has, and that the cache of its host has."""
        own = host = 0
        engine, cache = ("", candidate.name), (candidate.host, "")
        for n, block in enumerate(facts.blocks, 1):
            holders = self._where.get(block, {})
            if engine in holders and holders[engine] == self._lives[engine]:
                own = n
            if cache in holders and holders[cache] == self._lives[cache]:
                host = n
        return own, host

    def learn(self, facts: Facts, candidate: Candidate, cached: int | None) -> None:
        if cached == 0:
            for block in facts.blocks:
                self._where.pop(block, None)
        for block in facts.blocks:
            self._has(block, ("", candidate.name))
            self._has(block, (candidate.host, ""))

    def located(self, facts: Facts, host: str, blocks: int) -> None:
        for block in facts.blocks[:blocks]:
            self._has(block, (host, ""))
        for block in facts.blocks[blocks:]:
            self._where.get(block, {}).pop((host, ""), None)

    def forget(self, name: str = "", host: str = "") -> None:
        if name:
            self._lives["", name] += 1
        if host:
            self._lives[host, ""] += 1

    def _has(self, block: int, who: tuple[str, str]) -> None:
        self._where.setdefault(block, {})[who] = self._lives[who]
        self._where.move_to_end(block)
        while len(self._where) > REMEMBERED:
            self._where.popitem(last=False)

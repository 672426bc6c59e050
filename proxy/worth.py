"""Whether a prefill elsewhere is worth it for this request. Pure decisions over what routing knows.

Handing a prompt over costs a second request and a load of its KV; a short one, or one whose beginning the consumer's
own host has in its cache, is computed sooner than handed over. And when every producer has a line before its door, a
consumer that has none is the quicker way. Where the line lies is set by hand, or measured (quicker.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pdserve.proxy.facts import BLOCK
from pdserve.proxy.policies import chunk_location
from pdserve.proxy.policies.base import Candidate, Facts
from pdserve.proxy.quicker import Quicker


class Decision(NamedTuple):
    """`why`: the reason for leaving the producers out, as one word; "" if they are to be used. `uncached`: tokens to compute
    with a producer, and without; None where first tokens are not measured."""

    why: str = ""
    uncached: tuple[float, float] | None = None


class Worth:
    """`min_tokens`: fewer uncached tokens are prefilled by the consumer. `max_queue`: requests on each producer from
    which on consumers prefill themselves. 0 means never, for both. `adaptive`: as measured first tokens advise."""

    def __init__(self, min_tokens: int = 0, max_queue: int = 0, adaptive: bool = False) -> None:
        self._min_tokens, self._max_queue = min_tokens, max_queue
        self._quicker = Quicker() if adaptive else None
        self._where = chunk_location.Policy()
        self.bytes_per_token = 4.0

    @property
    def wants_blocks(self) -> bool:
        return self._min_tokens > 0 or self._quicker is not None

    def decide(self, facts: Facts, producers: Sequence[Candidate], consumers: Sequence[Candidate]) -> Decision:
        alone = self._uncached(facts, consumers) if self.wants_blocks else 0.0
        uncached = (self._uncached(facts, producers), alone) if self._quicker is not None else None
        why = ""
        if facts.prompt_bytes / self.bytes_per_token < self._min_tokens:
            why = "short-prompt"
        elif self._min_tokens and alone < self._min_tokens:
            why = "mostly-cached"
        elif self._crowded(producers, consumers):
            why = "producers-busy"
        elif self._quicker is not None and uncached is not None:
            why = self._quicker.why_not(*uncached, producers, consumers)
        return Decision(why, uncached)

    def _crowded(self, producers: Sequence[Candidate], consumers: Sequence[Candidate]) -> bool:
        """Every producer has a line before its door, and some consumer has none."""
        full = self._max_queue and all(p.load >= self._max_queue for p in producers)
        return bool(full) and min(c.load for c in consumers) < self._max_queue

    def _uncached(self, facts: Facts, candidates: Sequence[Candidate]) -> float:
        """Tokens of the prompt that whichever of them gets it has to compute, as far as is known."""
        matched = min((max(self._where.matched(facts, c)) for c in candidates), default=0)
        return max(0.0, facts.prompt_bytes - matched * BLOCK) / self.bytes_per_token

    def took(self, local: bool, uncached: float, seconds: float) -> None:
        """A request's first token came that long after its decision; `uncached` as it was then."""
        if self._quicker is not None:
            self._quicker.add(local, uncached, seconds)

    def learn(self, facts: Facts, candidate: Candidate, cached: int | None, tokens: int | None = None) -> None:
        """A reply came: the prompt is there now."""
        if tokens and facts.prompt_bytes:
            seen = min(8.0, max(1.0, facts.prompt_bytes / tokens))
            self.bytes_per_token += 0.05 * (seen - self.bytes_per_token)
        if self.wants_blocks:
            self._where.learn(facts, candidate, cached)

    def located(self, facts: Facts, host: str, blocks: int) -> None:
        self._where.located(facts, host, blocks)

    def forget(self, name: str = "", host: str = "") -> None:
        self._where.forget(name, host)

"""Everything that choosing instances needs, in one place: two policies, and whether a producer is worth it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from pdserve.engines.body import Body
from pdserve.proxy import facts as reading
from pdserve.proxy.policies import base
from pdserve.proxy.policies.base import Candidate, Facts
from pdserve.proxy.worth import Worth

RECENT = 512  # prompts of which daemons' news are looked up
_BY_PROMPT = ("prefix", "chunk_location")


class Routing:
    """Producers and consumers are chosen separately, each by a policy object of its own."""

    def __init__(self, prefill: str, decode: str, worth: Worth | None = None) -> None:
        self.prefill, self.decode = base.make(prefill), base.make(decode)
        self.worth = worth or Worth()
        self.recent: OrderedDict[str, Facts] = OrderedDict()  # the latest prompts, by request
        self.on_learned: Callable[[Facts], None] | None = None
        self._blocks = self.worth.wants_blocks or bool({prefill, decode} & {*_BY_PROMPT})

    def facts(self, endpoint: str, headers: list[tuple[bytes, bytes]], body: Body) -> Facts:
        return reading.facts(endpoint, headers, body, self._blocks)

    def learn(self, facts: Facts, candidate: Candidate, cached: int | None, tokens: int | None) -> None:
        """A reply of `candidate` came, for a prompt of `tokens` tokens of which `cached` had been there."""
        self.prefill.learn(facts, candidate, cached)
        self.decode.learn(facts, candidate, cached)
        self.worth.learn(facts, candidate, cached, tokens)
        if facts.request and facts.blocks:
            self.recent[facts.request] = facts
            self.recent.move_to_end(facts.request)
            while len(self.recent) > RECENT:
                self.recent.popitem(last=False)
            if self.on_learned is not None:
                self.on_learned(facts)

    @property
    def by_prompt(self) -> bool:
        """It matters where prompts are."""
        return self._blocks

    def located(self, facts: Facts, host: str, blocks: int) -> None:
        """The cache of that host has the first `blocks` blocks of this prompt."""
        for one in (self.prefill, self.decode, self.worth):
            one.located(facts, host, blocks)

    def forget(self, name: str = "", host: str = "") -> None:
        """That engine or the cache of that host begins anew."""
        for one in (self.prefill, self.decode, self.worth):
            one.forget(name, host)

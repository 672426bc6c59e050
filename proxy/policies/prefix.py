"""To the engine that was last sent the longest beginning of this prompt, unless it is much busier than the idlest.

It remembers its own choices only (the latest REMEMBERED blocks); what engines then really kept it does not know. That
is what chunk_location learns from their replies.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pdserve.proxy.policies import least_load
from pdserve.proxy.policies.base import C, Facts, Unlearning

REMEMBERED = 200_000
SLACK = 8  # more requests than the idlest has, plus half of its own, that a match is worth


class Policy(Unlearning):
    def __init__(self) -> None:
        self._last: OrderedDict[int, str] = OrderedDict()
        self._rest = least_load.Policy()

    def pick(self, facts: Facts, candidates: Sequence[C]) -> C:
        chosen = self._known(facts, candidates) or self._rest.pick(facts, candidates)
        for block in facts.blocks:
            self._last[block] = chosen.name
            self._last.move_to_end(block)
        while len(self._last) > REMEMBERED:
            self._last.popitem(last=False)
        return chosen

    def forget(self, name: str = "", host: str = "") -> None:
        for block in [block for block, chosen in self._last.items() if name and chosen == name]:
            del self._last[block]

    def _known(self, facts: Facts, candidates: Sequence[C]) -> C | None:
        by_name = {candidate.name: candidate for candidate in candidates}
        most = 1.5 * min(candidate.load for candidate in candidates) + SLACK
        for block in reversed(facts.blocks):
            found = by_name.get(self._last.get(block, ""))
            if found is not None and found.load <= most:
                return found
        return None

"""Whether chunks that peers hold are worth fetching, and which peer is asked for which. Pure.

The run of keys that a request misses is fetched as a whole or not at all, from several peers side by side: each chunk, in
the order of the prompt, goes to the holder that would have it here first. It is fetched when the last of them is predicted
to be here before the engine would have computed as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: tokens per second that an engine is believed to compute before one has said how fast it is
PREFILL_SPEED = 4000.0
#: a fetch costs at least this: asking, offering, checking digests
OVERHEAD_S = 0.01
#: fetching must be clearly faster, since the prediction is rough and computing is certain
MARGIN = 0.9


@dataclass(frozen=True)
class Holder:
    """A peer as the plan sees it: what it sends per second, and what it has been asked for and not sent yet."""

    url: str
    speed: float
    queued_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    #: url -> indices into the run
    parts: dict[str, list[int]]
    seconds: float


def plan(run: Sequence[Sequence[Holder]], chunk_bytes: int) -> Plan:
    """`run[i]` are the holders of the i-th chunk, at least one each."""
    ready: dict[str, float] = {}
    parts: dict[str, list[int]] = {}
    for i, holders in enumerate(run):
        best, when = "", float("inf")
        for holder in holders:
            begin = ready.get(holder.url, holder.queued_bytes / holder.speed)
            if begin + chunk_bytes / holder.speed < when:
                best, when = holder.url, begin + chunk_bytes / holder.speed
        ready[best] = when
        parts.setdefault(best, []).append(i)
    return Plan(parts, OVERHEAD_S + max((ready[url] for url in parts), default=0.0))


def worth(tokens: int, seconds: float, prefill_speed: float) -> bool:
    """Whether fetching `tokens` in `seconds` beats computing them."""
    return seconds < MARGIN * tokens / (prefill_speed or PREFILL_SPEED)

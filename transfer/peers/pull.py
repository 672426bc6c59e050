"""Whether chunks that peers hold are worth fetching, and which peer is asked for which. Pure.

The run of keys that a request misses is fetched from several peers side by side: each chunk, in the order of the prompt, goes
to the holder that would have it here first. It is fetched when the last of them is predicted to be here before the engine
would have computed as much. What a peer has on its disk comes at the speed of the slower of disk and link; where that makes
the whole too slow, what lies in memory before it may still be worth it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.transfer.peers.messages import MEMORY

#: tokens per second that an engine is believed to compute before one has said how fast it is
PREFILL_SPEED = 4000.0
#: a fetch costs at least this: asking, offering, checking digests
OVERHEAD_S = 0.01
#: fetching must be clearly faster, since the prediction is rough and computing is certain
MARGIN = 0.9


@dataclass(frozen=True)
class Holder:
    """A peer that has the chunk: what it sends per second from there, and how long it still sends what it was asked for."""

    url: str
    speed: float
    queued_s: float = 0.0
    place: int = MEMORY


#: of whom a part of the run is asked, and from which place it comes there
Giver = tuple[str, int]


@dataclass(frozen=True)
class Plan:
    #: indices into the run
    parts: dict[Giver, list[int]]
    seconds: float


def plan(run: Sequence[Sequence[Holder]], chunk_bytes: int) -> Plan:
    """`run[i]` are the holders of the i-th chunk, at least one each."""
    ready: dict[str, float] = {}
    parts: dict[Giver, list[int]] = {}
    for i, holders in enumerate(run):
        best, when = holders[0], float("inf")
        for holder in holders:
            begin = ready.get(holder.url, holder.queued_s)
            if begin + chunk_bytes / holder.speed < when:
                best, when = holder, begin + chunk_bytes / holder.speed
        ready[best.url] = when
        parts.setdefault((best.url, best.place), []).append(i)
    return Plan(parts, OVERHEAD_S + max((ready[url] for url, _ in parts), default=0.0))


def worth(tokens: int, seconds: float, prefill_speed: float) -> bool:
    """Whether fetching `tokens` in `seconds` beats computing them."""
    return seconds < MARGIN * tokens / (prefill_speed or PREFILL_SPEED)


def decide(
    run: Sequence[Sequence[Holder]], chunk_bytes: int, chunk_tokens: int, prefill_speed: float, at_most_s: float
) -> tuple[Plan, bool]:
    """(the plan, whether it is worth it) for the whole run; where that is not, for what comes before the first chunk that
    is on a disk only."""
    whole = plan(run, chunk_bytes)
    if _good(whole, len(run) * chunk_tokens, prefill_speed, at_most_s):
        return whole, True
    quick = next((i for i, holders in enumerate(run) if all(h.place != MEMORY for h in holders)), len(run))
    first = plan(run[:quick], chunk_bytes)
    if 0 < quick < len(run) and _good(first, quick * chunk_tokens, prefill_speed, at_most_s):
        return first, True
    return whole, False


def _good(made: Plan, tokens: int, prefill_speed: float, at_most_s: float) -> bool:
    return made.seconds <= at_most_s and worth(tokens, made.seconds, prefill_speed)

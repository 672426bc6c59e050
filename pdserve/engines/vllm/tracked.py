"""What the scheduler's half remembers of one request. Pure: time is handed in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pdserve.chunk import KeyChain
from pdserve.engines.vllm.breakeven import Choice
from pdserve.engines.vllm.messages import LoadResult
from pdserve.transfer import wire


@dataclass
class Hit:
    """A lookup's answer, its chunks under a lease."""

    lease: int  # 0: nothing is there yet, all of it is still to come
    daemon_id: str
    first_chunk: int
    found: list[wire.Found]
    end: int  # tokens from the start of the prompt that are covered
    at: float
    #: tokens that a producer has promised or is computing; more than `end` when some are still to come
    promised: int = 0
    stall_s: float = 0.0

    @property
    def reach(self) -> int:
        return max(self.end, self.promised)


class Wait:
    """Chunks that are on their way, promised by a producer or coming up from a lower tier: worth waiting for while they arrive."""

    def __init__(self, now: float) -> None:
        self.since = self.seen_at = now
        self.seen = 0  # tokens found so far
        self.polled_at = 0.0
        self.over = False
        self.longest = float("inf")
        self.at_first = 0  # tokens that were found when the wait began

    def goes_on(self, seen: int, now: float, stall: float) -> bool:
        """Whether to ask again: something came within the last `stall` seconds, and it has not taken `longest` in all."""
        if self.over:
            return False
        if seen > self.seen:
            self.seen, self.seen_at = seen, now
        self.over = now - self.seen_at > stall or now - self.since > self.longest
        return not self.over


@dataclass
class Tracked:
    """One request, from its first lookup until its last save and load are reported."""

    request: Any
    chain: KeyChain
    block_ids: list[int] = field(default_factory=list)
    hit: Hit | None = None
    loading: Hit | None = None  # handed to the workers; the lease lives until they are done
    loading_from: int = 0
    loading_since: float = 0.0
    no_load: bool = False  # a load failed once: this request computes
    no_save: bool = False
    next_chunk: int = 0  # full chunks before this are stored, being stored, or not worth it
    tail_done: bool = False
    outstanding: int = 0  # save jobs times workers that have not reported yet
    scheduled: bool = False  # some of its own tokens have been computed
    cached_tokens: int = 0  # of the prompt, when it was first scheduled: from the engine's own cache and from ours
    handover: Wait | None = None
    handed_over: bool = False  # what a producer promised has been loaded, or tried: it promises nothing any more
    fetch: Wait | None = None
    choice: Choice | None = None  # the decision about a hit, or why there is none
    left: tuple[int, int] = (0, 0)  # of a hit that is not loaded: its first chunk, and how many were found
    fetch_choice: Choice | None = None  # the decision whether to wait for what is in lower tiers
    computing_since: float = 0.0  # when the first of its own tokens was scheduled; 0: not, or measured already
    result: LoadResult | None = None
    finished: bool = False

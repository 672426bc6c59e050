"""What the scheduler's half remembers of one request. Pure: time is handed in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pdserve.chunk import KeyChain
from pdserve.engines.vllm.messages import LoadResult
from pdserve.transfer import wire


@dataclass
class Hit:
    """A lookup's answer, its chunks under a lease."""

    lease: int
    daemon_id: str
    first_chunk: int
    found: list[wire.Found]
    end: int  # tokens from the start of the prompt that are covered
    at: float


class Wait:
    """Chunks that are on their way, promised by a producer or coming up from a lower tier: worth waiting for while they arrive."""

    def __init__(self, now: float) -> None:
        self.since = self.seen_at = now
        self.seen = 0  # tokens found so far
        self.polled_at = 0.0
        self.over = False
        self.pending = False  # the next chunk is being written at this moment

    def goes_on(self, seen: int, now: float, stall: float, longest: float = float("inf")) -> bool:
        """Whether to ask again: something came within the last `stall` seconds, and it has not taken `longest` in all."""
        if self.over:
            return False
        if seen > self.seen:
            self.seen, self.seen_at = seen, now
        self.over = now - self.seen_at > stall or now - self.since > longest
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
    no_load: bool = False  # a load failed once: this request computes
    no_save: bool = False
    next_chunk: int = 0  # full chunks before this are stored, being stored, or not worth it
    tail_done: bool = False
    outstanding: int = 0  # save jobs times workers that have not reported yet
    cached_tokens: int = 0  # of the prompt, when it was first scheduled: from the engine's own cache and from ours
    handover: Wait | None = None
    fetch: Wait | None = None
    result: LoadResult | None = None
    finished: bool = False

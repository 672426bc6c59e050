"""The way down: chunks are written to lower tiers after their commit, when they are used, or before they are evicted.

Runs in the daemon's loop, except on_thread(). Bounded in number, bytes and time: a write that does not fit into its tier's
queue is dropped. No engine waits for any of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from pdserve.transfer.below import Below
from pdserve.transfer.lower import Lower, Write
from pdserve.transfer.resident import Chunk
from pdserve.transfer.tiers.base import TierError

#: share of the arena that may be kept from eviction because it is on its way down
DOWN_SHARE = 8
#: but so many chunks always, in up to half of a small arena: they are committed in one go, and of a prompt of which only the first
#: is written down, only the first is ever found again
DOWN_LEAST, DOWN_HALF = 16, 2
#: `on-evict`: begins to write and evict ahead above the first share of the arena, stops at the second
HIGH, LOW = 0.90, 0.80
#: chunks that are evicted ahead of need before requests have their turn
A_TURN = 64


class Writing:
    """`shards` says where a chunk's bytes are."""

    def __init__(self, below: Below, shards: Callable[[Chunk], list[np.ndarray]]) -> None:
        self._below, self._store, self._m = below, below.store, below.metrics
        self._shards = shards
        self.closing = False
        self._store.on_committed.append(self._committed)

    def _committed(self, chunk: Chunk) -> None:
        for lower in self._below.lowers:
            if lower.rules.write == "write-through":
                self._offer(lower, chunk)

    def used(self, chunks: list[Chunk]) -> None:
        """A client has loaded these from DRAM."""
        for lower in self._below.lowers:
            if lower.rules.write == "selective":
                for chunk in chunks:
                    if chunk.committed and not chunk.dead:
                        self._offer(lower, chunk)
            touch = getattr(lower.tier, "touch", None)
            if touch is not None:
                touch([c.key for c in reversed(chunks)])  # the root last: it must not go before its children

    def relieve(self) -> None:
        """`on-evict`: above the high mark, what would go next is written down and evicted ahead of need."""
        lowers = [lower for lower in self._below.lowers if lower.rules.write == "on-evict"]
        capacity = self._store.allocator.capacity
        if not lowers or self._store.allocator.used <= HIGH * capacity:
            return
        for _ in range(A_TURN):
            victim = self._store.victim()  # one that is being written is held, so the next is another one
            if victim is None or victim.leases or not any([self._offer(lower, victim) for lower in lowers]):
                break
            if not victim.leases:  # all of them have it already
                self._evict_ahead(victim)
                if self._store.allocator.used <= LOW * capacity:
                    break

    def _evict_ahead(self, chunk: Chunk) -> None:
        if not chunk.dead and not chunk.leases and self._store.allocator.used > LOW * self._store.allocator.capacity:
            self._store.drop([chunk.key], "capacity")

    def _offer(self, lower: Lower, chunk: Chunk) -> bool:
        """Queues the chunk for the tier; False when it was dropped instead."""
        if chunk.below & lower.bit:
            return True
        if lower.indexed and lower.may_give(chunk.key) and lower.tier.contains([chunk.key])[0] is not None:
            chunk.below |= lower.bit
            return True
        size, capacity = chunk.size, self._store.allocator.capacity
        limit = max(capacity // DOWN_SHARE, min(DOWN_LEAST * size, capacity // DOWN_HALF))
        if self.closing or lower.down >= lower.rules.max_queued or (lower.down and lower.down_bytes + size > limit):
            self._m["cache_tier_dropped_writes_total"].labels(lower.name).inc()
            return False
        self._store.hold(chunk)
        chunk.below |= lower.bit
        lower.down += 1
        lower.down_bytes += size
        lower.call_down(Write(chunk, chunk.record(), self._shards(chunk), chunk.uses))
        return True

    def on_thread(self, lower: Lower, writes: list[Write]) -> None:
        started = time.monotonic()
        outcomes, why = [(write, "error") for write in writes], ""
        try:
            chunks = [(w.record, w.shards) for w in writes]
            if len(chunks) > 1:
                stored = lower.tier.put_many(chunks, started + lower.rules.put_s)  # type: ignore[attr-defined]
            else:
                stored = [lower.tier.put(*chunks[0], started + lower.rules.put_s)]
            outcomes = [(w, "" if there else "refused") for w, there in zip(writes, stored, strict=True)]
        except TierError as e:
            why = str(e)
        except Exception as e:  # noqa: BLE001 - a tier is somebody else's code: nothing was written
            why = f"{type(e).__name__}: {e}"
        seconds = (time.monotonic() - started) / len(writes)
        self._below.post(lambda: self._writes_done(lower, outcomes, why, seconds))

    def _writes_done(self, lower: Lower, outcomes: list[tuple[Write, str]], why: str, seconds: float) -> None:
        written: list[Chunk] = []
        took = self._m["cache_tier_seconds"].labels(lower.name, "put")
        for write, outcome in outcomes:
            chunk = write.chunk
            lower.down -= 1
            lower.down_bytes -= chunk.size
            self._store.unhold(chunk)
            took.observe(seconds)
            if outcome:
                chunk.below &= ~lower.bit
                self._below.failed(lower.name, "put", outcome, why)
                continue
            written.append(chunk)
            if lower.rules.write == "on-evict" and chunk.uses == write.uses:
                self._evict_ahead(chunk)
        if written:  # a counter's own cost is a good part of a chunk's
            self._m["cache_tier_chunks_total"].labels(lower.name, "down").inc(len(written))
            self._m["cache_tier_bytes_total"].labels(lower.name, "down").inc(sum(c.payload_bytes for c in written))
            self._m["cache_tier_tokens_total"].labels(lower.name, "down").inc(sum(c.tokens for c in written))

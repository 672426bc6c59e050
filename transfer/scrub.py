"""Reads everything again in the background, slowly, and drops what does not match its digest any more."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pdserve import kernels, log
from pdserve.transfer.resident import Chunk
from pdserve.transfer.store import Store
from pdserve.transfer.tiering import Tiering
from pdserve.transfer.tiers import segments
from pdserve.transfer.tiers.base import ChunkRecord, CorruptChunk, Tier, TierError

DEFAULT_RATE = 32 << 20  # bytes/s
EVERY_S = 3600.0
READ_S = 30.0


class Scrubber:
    """One pass after the other. Owned by the loop; bytes are looked at in one thread of its own."""

    def __init__(self, store: Store, tiering: Tiering, metrics: dict[str, Any], rate: int = DEFAULT_RATE) -> None:
        self._store, self._tiering, self._m, self.rate = store, tiering, metrics, rate
        self._log = log.get("scrub")
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pdserve-scrub")
        self._at_once = False
        self.state: dict[str, Any] = {"passes": 0, "running": False, "done": 0, "total": 0, "corrupt": 0, "rate": rate}

    def start(self, *, at_once: bool = False) -> None:
        """A pass now; `at_once`: as fast as it goes."""
        self._at_once = at_once
        self._wake.set()

    @property
    def progress(self) -> float:
        if not self.state["running"]:
            return 1.0
        return float(self.state["done"]) / max(1, self.state["total"])

    async def run(self) -> None:
        """Until cancelled: a pass whenever the last is EVERY_S old. Rate 0: only when asked for."""
        try:
            while True:
                try:
                    await asyncio.wait_for(self._wake.wait(), EVERY_S if self.rate else None)
                except TimeoutError:
                    self._at_once = False
                self._wake.clear()
                await self._pass()
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _pass(self) -> None:
        tiers = [lower.tier for lower in self._tiering.lowers if lower.indexed and hasattr(lower.tier, "records")]
        here = [chunk.key for chunk in self._store.chunks()]
        below = [(tier, record) for tier in tiers for record in tier.records()]
        self.state.update(running=True, done=0, total=len(here) + len(below))
        started, corrupt = time.monotonic(), self.state["corrupt"]
        for key in here:
            await self._check_here(key)
        for tier, record in below:
            await self._check_below(tier, record)
        self.state.update(running=False, passes=self.state["passes"] + 1)
        found = self.state["corrupt"] - corrupt
        self._log.info(
            "%d chunks verified in %.1f s, %d of them wrong", self.state["done"], time.monotonic() - started, found
        )

    async def _check_here(self, key: bytes) -> None:
        chunk = self._store.peek(key)
        if chunk is None or not chunk.committed:
            return
        self._store.hold(chunk)
        try:
            right = await asyncio.get_running_loop().run_in_executor(
                self._thread, _matches, self._tiering.shards(chunk), chunk.record()
            )
        finally:
            self._store.unhold(chunk)
        if not right:
            self._wrong("dram", chunk.key)
            if not chunk.dead:
                self._store.drop([key], "corrupt")
        await self._done("dram", chunk)

    async def _check_below(self, tier: Any, record: ChunkRecord) -> None:
        right = await asyncio.get_running_loop().run_in_executor(self._thread, _check_tier, tier, record)
        if right is None:
            return
        if not right:
            self._wrong(tier.name, record.key)
        await self._done(tier.name, record)

    def _wrong(self, tier: str, key: bytes) -> None:
        self.state["corrupt"] += 1
        self._m["cache_digest_failures_total"].labels(tier).inc()
        self._log.error("digest mismatch in %s, dropped: %s", tier, key.hex()[:16])

    async def _done(self, tier: str, what: Chunk | ChunkRecord) -> None:
        self.state["done"] += 1
        self._m["cache_scrubbed_chunks_total"].labels(tier).inc()
        self._m["cache_scrubbed_bytes_total"].labels(tier).inc(what.payload_bytes)
        rate = 0 if self._at_once else self.rate or DEFAULT_RATE
        await asyncio.sleep(what.payload_bytes / rate if rate else 0)


def _matches(shards: list[np.ndarray], record: ChunkRecord) -> bool:
    return [kernels.digest(shard) for shard in shards] == record.digests


def _check_tier(tier: Tier, record: ChunkRecord) -> bool | None:
    """None: gone meanwhile, or not readable now (which the tier notes itself)."""
    shards = [segments.aligned(record.shard_bytes)[: record.shard_bytes] for _ in record.digests]
    try:
        if not tier.get(record, shards, time.monotonic() + READ_S):
            return None
    except CorruptChunk:
        return False
    except TierError:
        return None
    if _matches(shards, record):
        return True
    getattr(tier, "quarantine", lambda key: tier.delete([key]))(record.key)
    return False

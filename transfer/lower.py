"""A lower tier as the daemon uses it: its rules, its threads, what is queued for them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pdserve.transfer.resident import Chunk
from pdserve.transfer.tiers.base import ChunkRecord, Tier

#: chunks, and bytes of them, that are written together where a tier takes several at once
MOST_TOGETHER, TOGETHER_BYTES = 8, 8 << 20
WRITE_POLICIES = ("write-through", "on-evict", "selective")


@dataclass(frozen=True)
class Rules:
    """How a tier is used."""

    write: str = "write-through"
    get_s: float = 10.0
    put_s: float = 30.0
    readers: int = 2
    max_queued: int = 256
    #: where it is, as it may be shown
    url: str = ""


@dataclass(frozen=True)
class Write:
    """A chunk that is to be written down. `uses` it had when that was decided."""

    chunk: Chunk
    record: ChunkRecord
    shards: list[np.ndarray]
    uses: int


class Lower:
    """One lower tier, its threads and what is queued for them. Counters belong to the loop."""

    def __init__(self, tier: Tier, rules: Rules, bit: int = 0) -> None:
        """`bit` stands for it in Chunk.below."""
        self.tier, self.rules, self.bit = tier, rules, bit
        self.name = tier.name
        #: contains() is so quick that the loop may ask
        self.indexed: bool = getattr(tier, "indexed", False)
        self.up = self.up_bytes = self.down = self.down_bytes = 0  # bytes of arena
        #: what is being deleted from it: these keys, or (None) what only the tier itself knows
        self.going: list[frozenset[bytes] | None] = []
        self.rate = 100e6  # bytes/s up, as seen lately; the first guess is a slow disk's
        self.idle_since = 0.0
        #: carries out writes, on the thread that writes
        self.write: Callable[[list[Write]], None] = lambda _: None
        self._most = MOST_TOGETHER if hasattr(tier, "put_many") else 1
        self._ups: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._downs: queue.SimpleQueue[Callable[[], None] | Write | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name=f"pdserve-{self.name}", daemon=True)
            for work in [self._work_up] * rules.readers + [self._work_down]
        ]
        for thread in self._threads:
            thread.start()

    def call_up(self, job: Callable[[], None]) -> None:
        self._ups.put(job)

    def call_down(self, job: Callable[[], None] | Write) -> None:
        """In order. Writes that wait behind one another are carried out together where the tier can."""
        self._downs.put(job)

    @property
    def deleting(self) -> bool:
        return bool(self.going)

    def may_give(self, key: bytes) -> bool:
        """What is about to be deleted is not brought up any more: it would be in memory, and stay."""
        return all(keys is not None and key not in keys for keys in self.going)

    def seconds_for(self, size: int) -> float:
        return (self.up_bytes + size) / self.rate

    def close(self, deadline: float) -> None:
        for _ in range(self.rules.readers):
            self._ups.put(None)
        self._downs.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self.tier.close()

    def _work_up(self) -> None:
        while (job := self._ups.get()) is not None:
            job()

    def _work_down(self) -> None:
        job = self._downs.get()
        while job is not None:
            if isinstance(job, Write):
                job = self._write_from(job)
            else:
                job()
                job = self._downs.get()

    def _write_from(self, first: Write) -> Callable[[], None] | Write | None:
        """Writes it and what stands behind it; returns the first job that was not among them."""
        writes, size = [first], first.record.payload_bytes
        following: Callable[[], None] | Write | None = None
        waiting = True
        while waiting and len(writes) < self._most and size < TOGETHER_BYTES:
            try:
                following = self._downs.get_nowait()
            except queue.Empty:
                break
            waiting = isinstance(following, Write)
            if isinstance(following, Write):
                writes.append(following)
                size += following.record.payload_bytes
        self.write(writes)
        return self._downs.get() if waiting else following


class InPlace:
    """The arena as an earlier daemon left it, as a tier: the bytes are where they belong and only need to be verified."""

    name = "dram"
    indexed = True

    def contains(self, keys: list[bytes]) -> list[ChunkRecord | None]:
        return [None] * len(keys)

    def get(self, record: ChunkRecord, into: list[np.ndarray], deadline: float) -> bool:
        return True

    def put(self, record: ChunkRecord, payload: list[np.ndarray], deadline: float) -> bool:
        return False

    def delete(self, keys: list[bytes]) -> int:
        return 0

    def stats(self) -> dict[str, int | float | str]:
        return {"chunks": 0, "used_bytes": 0, "capacity_bytes": 0, "state": "ok"}

    def close(self) -> None:
        pass

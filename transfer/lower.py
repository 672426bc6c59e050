"""A lower tier as the daemon uses it: its rules, its threads, what is queued for them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pdserve.transfer.tiers.base import ChunkRecord, Tier

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


class Lower:
    """One lower tier, its threads and what is queued for them. Counters belong to the loop."""

    def __init__(self, tier: Tier, rules: Rules) -> None:
        self.tier, self.rules = tier, rules
        self.name = tier.name
        #: contains() is so quick that the loop may ask
        self.indexed: bool = getattr(tier, "indexed", False)
        self.up = self.up_bytes = self.down = self.down_bytes = 0  # bytes of arena
        self.deleting = 0
        self.rate = 100e6  # bytes/s up, as seen lately; the first guess is a slow disk's
        self.idle_since = 0.0
        self._ups: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._downs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(jobs,), name=f"pdserve-{self.name}", daemon=True)
            for jobs in [self._ups] * rules.readers + [self._downs]
        ]
        for thread in self._threads:
            thread.start()

    def call_up(self, job: Callable[[], None]) -> None:
        self._ups.put(job)

    def call_down(self, job: Callable[[], None]) -> None:
        self._downs.put(job)

    def seconds_for(self, size: int) -> float:
        return (self.up_bytes + size) / self.rate

    def close(self, deadline: float) -> None:
        for _ in range(self.rules.readers):
            self._ups.put(None)
        self._downs.put(None)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self.tier.close()


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()


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

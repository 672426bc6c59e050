"""A tier in this process's own memory: what the conformance suite means, in plain Python, and a tier that fails on demand.

Tests of whatever stands above a tier use it: `faults` makes it stall, fail, break off in the middle of a put, or lie.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np

from pdserve.transfer.tiers.base import ChunkRecord, TierError
from pdserve.transfer.tiers.offload import DeadlinePassed


class Faults:
    """What the next calls suffer."""

    def __init__(self) -> None:
        self._answering = threading.Event()
        self._answering.set()
        self.fail_next = 0
        self.break_next_put = False

    def stall(self) -> None:
        self._answering.clear()

    def resume(self) -> None:
        self._answering.set()

    def suffer(self, deadline: float) -> None:
        if not self._answering.wait(max(0.0, deadline - time.monotonic())) or time.monotonic() > deadline:
            raise DeadlinePassed("memory: no answer before the deadline")
        if self.fail_next:
            self.fail_next -= 1
            raise TierError("memory: told to fail")


class MemoryTier:
    """A dictionary with a capacity (0: none) and no eviction: what does not fit is refused."""

    def __init__(self, capacity_bytes: int = 0, timeout: float = 1.0) -> None:
        self.name = "memory"
        self.faults = Faults()
        self._capacity = capacity_bytes
        self._timeout = timeout
        self._lock = threading.Lock()
        self._chunks: dict[bytes, tuple[ChunkRecord, bytearray]] = {}

    def contains(self, keys: list[bytes]) -> list[ChunkRecord | None]:
        self.faults.suffer(time.monotonic() + self._timeout)
        with self._lock:
            found = [self._chunks.get(key) for key in keys]
        return [f[0] if f else None for f in found]

    def get(self, record: ChunkRecord, into: list[np.ndarray], deadline: float) -> bool:
        self.faults.suffer(deadline)
        with self._lock:
            found = self._chunks.get(record.key)
            if found is None or found[0] != record:
                return False
            for i, array in enumerate(into):
                start = i * record.shard_bytes
                array[:] = np.frombuffer(found[1], np.uint8, record.shard_bytes, start)
        return True

    def put(self, record: ChunkRecord, payload: list[np.ndarray], deadline: float) -> bool:
        self.faults.suffer(deadline)
        if self.faults.break_next_put:
            self.faults.break_next_put = False
            raise TierError("memory: told to break off")
        whole = bytearray().join(memoryview(part) for part in payload)
        with self._lock:
            old = self._chunks.get(record.key)
            used = self._used() - (len(old[1]) if old else 0)
            if self._capacity and used + len(whole) > self._capacity:
                return False
            self._chunks[record.key] = (record, whole)
        return True

    def delete(self, keys: list[bytes]) -> int:
        self.faults.suffer(time.monotonic() + self._timeout)
        with self._lock:
            return sum(self._chunks.pop(key, None) is not None for key in keys)

    def listing(self, deadline: float) -> Iterator[ChunkRecord]:
        self.faults.suffer(deadline)
        with self._lock:
            return iter([record for record, _ in self._chunks.values()])

    def stats(self) -> dict[str, int | float | str]:
        with self._lock:
            return {
                "chunks": len(self._chunks),
                "used_bytes": self._used(),
                "capacity_bytes": self._capacity,
                "state": "ok",
            }

    def close(self) -> None:
        with self._lock:
            self._chunks.clear()

    def corrupt(self, key: bytes, position: int) -> None:
        """Flips one bit of a stored payload."""
        with self._lock:
            self._chunks[key][1][position] ^= 1

    def _used(self) -> int:
        return sum(len(data) for _, data in self._chunks.values())

"""A store with one tier below it: real threads, a memory tier that fails on demand, a loop that the test turns."""

import queue
import threading
import time

import numpy as np
from prometheus_client import CollectorRegistry

from pdserve import kernels
from pdserve.metrics.cache import CACHE
from pdserve.metrics.metric import build
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.eviction import LeafFirstLru
from pdserve.transfer.lower import Rules
from pdserve.transfer.store import Store
from pdserve.transfer.tiering import Tiering
from pdserve.transfer.tiers.memory import MemoryTier
from pdserve.transfer.wire import GRANTED, CommitItem, ReserveItem

SHARD = PAGE + 8  # not a whole page: the arena pads it


def key(i):
    return i.to_bytes(32, "little")


def content(i, shard=0):
    return np.full(SHARD, (i * 7 + shard) % 251, np.uint8)


class IndexedMemory(MemoryTier):
    indexed = True

    def __init__(self):
        super().__init__()
        self.quarantined, self.touched = [], []

    def contains(self, keys):
        return [self._chunks[k][0] if k in self._chunks else None for k in keys]

    def quarantine(self, k):
        self.quarantined.append(k)
        self.delete([k])

    def touch(self, keys):
        self.touched += keys


class Together(IndexedMemory):
    """Takes several at once, when `open` is set; `calls`: what it was asked for."""

    def __init__(self, answer=None):
        super().__init__()
        self.open, self.calls, self.answer = threading.Event(), [], answer

    def put(self, record, payload, deadline):
        return self._gated([record.key], lambda: super(Together, self).put(record, payload, deadline))

    def put_many(self, chunks, deadline):
        def each():
            stored = [super(Together, self).put(*c, deadline) for c in chunks]
            return self.answer(stored) if self.answer else stored

        return self._gated([record.key for record, _ in chunks], each)

    def delete(self, keys):
        return self._gated(["delete", *keys], lambda: super(Together, self).delete(keys))

    def _gated(self, what, do):
        self.calls.append(what)
        assert self.open.wait(30)
        return do()


class World:
    """A store over an array, one tier below, and the loop's queue."""

    def __init__(self, tier=None, pages=40, **rules):
        self.arena = np.zeros(pages * PAGE, np.uint8)
        self.metrics = build(CACHE, CollectorRegistry())
        self.store = Store(self.arena.size, LeafFirstLru(), self.metrics)
        self.posted = queue.Queue()
        self.tiering = Tiering(self.store, lambda: self.arena, self.metrics, self.posted.put)
        self.tier = tier or IndexedMemory()
        self.tiering.add(self.tier, Rules(**rules))
        self.lower = self.tiering.lowers[0]

    def turn(self, until, patience=60.0):
        """Runs what the threads have posted until `until()` holds."""
        ends = time.monotonic() + patience
        while not until():
            assert time.monotonic() < ends, "it did not come to that"
            try:
                self.posted.get(timeout=0.02)()
            except queue.Empty:
                continue

    def settle(self):
        self.turn(lambda: not self.lower.up and not self.lower.down and self.posted.empty())

    def put(self, i, shards=2):
        grants = []
        for shard in range(shards):
            item = ReserveItem(key(i), key(i - 1) if i > 1 else b"", shard, shards, SHARD, 256, b"tenant")
            (grant,) = self.store.reserve([item], "w", 1, time.monotonic())
            if grant.status != GRANTED:
                return grant.status
            self.arena[grant.offset : grant.offset + SHARD] = content(i, shard)
            grants.append(CommitItem(grant.reservation, kernels.digest(content(i, shard))))
        self.store.commit(grants, 1)
        if self.tier.faults._answering.is_set():
            self.settle()
        return GRANTED

    def lookup(self, *ids):
        """(tiers of what was found, after checking every byte; how many are loading)."""
        keys = [key(i) for i in ids]
        lease, found, _ = self.store.lookup(keys, 9, time.monotonic())
        for i, f in zip(ids, found, strict=False):
            for shard in range(len(f.digests)):
                start = f.offset + shard * f.stride
                assert (self.arena[start : start + f.shard_bytes] == content(i, shard)).all()
        if lease:
            self.store.release(lease, 9)
        return [f.tier for f in found], self.tiering.loading(keys[len(found) :], time.monotonic())

    def fetch(self, *ids):
        """Asks until nothing is on its way any more."""
        found, loading = self.lookup(*ids)
        while loading:
            self.settle()
            found, loading = self.lookup(*ids)
        return found

    def forget(self):
        """DRAM is emptied, the tier is not."""
        self.settle()
        self.store.clear()
        self.arena[:] = 0

    def value(self, name, *labels):
        return self.metrics[name].labels(*labels)._value.get()

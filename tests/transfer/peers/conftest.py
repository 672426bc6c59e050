"""Hosts without processes: each a store, an arena and a Node, joined by the in-memory transport."""

import asyncio
import time
import types

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from pdserve import kernels
from pdserve.chunk import FORMAT_VERSION
from pdserve.metrics.cache import CACHE
from pdserve.metrics.metric import build
from pdserve.metrics.peers import PEERS
from pdserve.transfer.eviction import LeafFirstLru
from pdserve.transfer.lower import Rules
from pdserve.transfer.peers import fetching, follow
from pdserve.transfer.peers import link as link_module
from pdserve.transfer.peers.node import Node
from pdserve.transfer.peers.sources import Static
from pdserve.transfer.store import Store
from pdserve.transfer.tiering import Tiering
from pdserve.transfer.tiers.base import ChunkRecord
from pdserve.transfer.tiers.disk import DiskTier
from pdserve.transfer.transports.base import Local
from pdserve.transfer.transports.fake import FakeNetwork, FakeTransport
from pdserve.transfer.transports.session import Limits
from pdserve.transfer.wire import CommitItem, ReserveItem

PAGE = 4096
SHARDS = 2
SHARD = 3 * PAGE - 8


def key(i):
    return int(i).to_bytes(8, "little") + bytes(24)


def content(i, shard=0):
    return np.random.default_rng(i * 7 + shard).integers(0, 256, SHARD, dtype=np.uint8)


class Host:
    """`listed` may be changed at any time: it is what the source says next. `disk`: a folder for a disk tier."""

    def __init__(self, network, name, pages=400, epoch="1", disk=None):
        self.name, self.network = name, network
        self.arena = np.zeros(pages * PAGE, np.uint8)
        registry = CollectorRegistry()
        self.metrics = build(CACHE, registry) | build(PEERS, registry)
        self.store = Store(self.arena.size, LeafFirstLru(), self.metrics)
        self.transport = FakeTransport(network, Local(name, self.arena), Limits())
        self.listed = {}
        self.tiering = Tiering(self.store, lambda: self.arena, self.metrics, self.post)
        self.disk = None
        if disk is not None:
            self.disk = DiskTier(disk / name, 64 << 20, min_free=0, segment_bytes=1 << 20)
            self.tiering.add(self.disk, Rules())
        self.node = Node(
            name=name,
            epoch=f"{name}-{epoch}",
            chunk_tokens=256,
            store=self.store,
            metrics=self.metrics,
            transport=self.transport,
            listen=f"fake://{name}",
            source=lambda own: types.SimpleNamespace(peers=lambda: dict(self.listed), close=lambda: None),
            lower=self.tiering,
            after=lambda: None,
        )
        self.tiering.beyond = self.node.fetching
        self.loop = None

    def post(self, function):
        if self.loop is not None:
            self.loop.call_soon_threadsafe(function)

    async def start(self, *others):
        self.loop = asyncio.get_running_loop()
        self.listed = {f"fake://{name}": name for name in (self.name, *others)}
        await self.node.start()
        self.ticking = asyncio.create_task(self._tick())
        return self

    async def _tick(self):
        while True:
            await asyncio.sleep(0.05)
            self.node.tick(time.monotonic())
            self.store.expire(time.monotonic())
            self.tiering.tick(time.monotonic())

    async def stop(self):
        self.ticking.cancel()
        await self.node.stop()
        await asyncio.to_thread(self.tiering.close, 2.0)
        await asyncio.sleep(0)  # what its threads have posted

    def put(self, i, client=1):
        """An engine stores chunk i."""
        item = ReserveItem(key(i), b"", 0, SHARDS, SHARD, 256, count=SHARDS)
        (grant,) = self.store.reserve([item], "engine", client, time.monotonic())
        assert grant.status == 0, grant
        chunk = self.store.peek(key(i))
        for shard in range(SHARDS):
            start = grant.offset + shard * chunk.stride
            self.arena[start : start + SHARD] = content(i, shard)
        digests = [kernels.digest(content(i, shard)) for shard in range(SHARDS)]
        self.store.commit([CommitItem(grant.reservation, digests[0], digests[1:])], client)

    def has(self, i):
        chunk = self.store.peek(key(i))
        return chunk is not None and chunk.committed

    def right(self, i):
        """The bytes of chunk i are what was stored."""
        chunk = self.store.peek(key(i))
        starts = [chunk.offset + shard * chunk.stride for shard in range(SHARDS)]
        return all((self.arena[s : s + SHARD] == content(i, n)).all() for n, s in enumerate(starts))

    def lookup(self, numbers, prefill_speed=1.0):
        """As the daemon does: what is missing is asked of the peers; how many are on their way."""
        now = time.monotonic()
        keys = [key(i) for i in numbers if not self.has(i)]
        if keys:
            self.node.fetching.prefill_speed = prefill_speed
            self.node.fetching.ask(keys, now)
        return sum(self.node.fetching.coming(k, now) for k in keys)

    def state(self, peer):
        return next((p["state"] for p in self.node.status()["peers"] if p["name"] == peer), None)

    def counted(self, name, *labels):
        return self.metrics[name].labels(*labels)._value.get()

    def nothing_is_held(self):
        """No hold, no reservation, nothing on its way."""
        chunks = self.store._index.values()
        assert [c.key.hex()[:16] for c in chunks if not c.committed or c.leases] == []
        assert self.store.stats()["reservations"] == 0
        status = self.node.status()
        assert (status["incoming"], status["pulling"], status["rising"]) == (0, 0, 0)
        assert [p["outgoing"] for p in status["peers"] if p["outgoing"]] == []
        assert self.node.inbox.nbytes == 0


async def until(condition, what="it happens", patience=60.0):
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


@pytest.fixture
def network(monkeypatch):
    """Looks often, and patient: on a busy machine nobody counts as silent."""
    monkeypatch.setattr(link_module, "SYNC_EVERY_S", 0.02)
    monkeypatch.setattr(link_module, "CALL_S", 20.0)
    monkeypatch.setattr(link_module, "PUSH_S", 30.0)
    monkeypatch.setattr(fetching, "BEYOND_S", 30.0)
    monkeypatch.setattr(fetching, "PULL_S", 40.0)
    monkeypatch.setattr(follow, "LIST_EVERY_S", 0.05)
    return FakeNetwork()


def hurry(monkeypatch):
    """For tests in which somebody does not answer: that is found out soon."""
    monkeypatch.setattr(link_module, "CALL_S", 0.5)
    monkeypatch.setattr(link_module, "PUSH_S", 1.0)


def give_up_soon(monkeypatch):
    """For tests in which something does not come."""
    monkeypatch.setattr(fetching, "BEYOND_S", 1.0)


@pytest.fixture
def helpers():
    return types.SimpleNamespace(
        Host=Host, key=key, content=content, until=until, Static=Static, ChunkRecord=ChunkRecord,
        FORMAT_VERSION=FORMAT_VERSION, SHARD=SHARD, hurry=hurry, give_up_soon=give_up_soon,
    )  # fmt: skip

"""What a lookup's reply tells of other tenants: nothing, not even by the work that it takes.

Times are not measured here (they are noise on a busy machine); the work is counted: which containers are asked how often,
which tiers are asked for what, and how many bytes are answered. A key holds its cache_salt, so a chunk of another salt is a
key that is not there; the test is that "stored under another salt" and "never stored by anybody" cannot be told apart.
"""

import asyncio
import os

import numpy as np
import pytest

from pdserve import chunk, kernels
from pdserve.transfer import wire
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.daemon import Daemon
from pdserve.transfer.lower import Rules
from pdserve.transfer.tiers.disk import DiskTier
from pdserve.transfer.tiers.memory import MemoryTier


class Noting(dict):
    """A dictionary that notes each time that it is asked."""

    def __init__(self, name, notes, content):
        super().__init__(content)
        self.name, self.notes = name, notes

    def get(self, *words):
        self.notes.append(self.name)
        return super().get(*words)

    def __contains__(self, key):
        self.notes.append(self.name)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.notes.append(self.name)
        return super().__getitem__(key)


class Asked(MemoryTier):
    """A remote tier that notes what it is asked for."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def contains(self, keys):
        self.calls.append(("contains", len(keys)))
        return super().contains(keys)

    def get(self, *words):
        self.calls.append("get")
        return super().get(*words)


@pytest.fixture
def world(tmp_path):
    notes = []
    tiers = [
        (DiskTier(tmp_path, 1 << 20, min_free=0, segment_bytes=1 << 17), Rules()),
        (Asked(), Rules()),
    ]
    daemon = Daemon(name=f"test-{os.getpid()}-iso", size=1 << 20, chunk_tokens=256, tiers=tiers)
    yield daemon, notes
    daemon.close()


LAYOUT = chunk.ChunkLayout(kind=chunk.OPAQUE, kv_dtype="bf16", layers=1, block_tokens=16, block_bytes=256, shards=1)


def keys_under(salt, first=0):
    """Of one and the same prompt, which begins with the token `first`."""
    return chunk.KeyChain(chunk.root_key("model", LAYOUT, cache_salt=salt), 256).full(list(range(first, first + 768)))


def store(daemon, keys, tag):
    data = np.random.default_rng(1).integers(0, 256, PAGE, dtype=np.uint8)
    for i, key in enumerate(keys):
        item = wire.ReserveItem(key, keys[i - 1] if i else b"", 0, 1, PAGE, 256, tag)
        (grant,) = daemon.answer(wire.Reserve(1, "w", [item]), 1).grants
        daemon.arena.bytes[grant.offset : grant.offset + PAGE] = data
        assert daemon.answer(wire.Commit(2, [wire.CommitItem(grant.reservation, kernels.digest(data))]), 1).count == 1


async def until(what):
    for _ in range(4000):
        if what():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to that")


def at_rest(daemon):
    return not any(x.up or x.down for x in daemon.tiering.lowers)


def watched(daemon, notes):
    """From here on every container that a lookup may ask says so."""
    disk = daemon.tiering.lowers[0].tier
    for owner, name in (
        (daemon.store, "_index"),
        (daemon.tiering, "_loads"),
        (daemon.tiering, "_not_before"),
        (daemon.tiering.remote, "_known"),
        (disk._shelf, "index"),
    ):
        setattr(owner, name, Noting(f"{type(owner).__name__}.{name}", notes, getattr(owner, name)))


async def story(daemon, notes, keys):
    """Asks for `keys` until the answer is final; all that was looked at and said on the way, and what the tier was asked."""
    told, tier = [], daemon.tiering.lowers[1].tier
    tier.calls.clear()
    while True:
        notes.clear()
        reply = daemon.answer(wire.Lookup(7, keys), 2)
        told.append((list(notes), wire.encode(reply)))
        if not reply.loading:
            return told, list(tier.calls)
        await until(lambda: not any(daemon.tiering.remote.asking(k, 0.0) for k in keys))


@pytest.mark.parametrize("where", ["memory", "disk and remote"])
def test_a_chunk_of_another_salt_is_answered_exactly_as_one_that_nobody_stored(world, where):
    daemon, notes = world

    async def run():
        daemon.loop = asyncio.get_running_loop()
        store(daemon, keys_under("alice"), b"alice")
        await until(lambda: at_rest(daemon))
        if where != "memory":
            daemon.store.clear()
        watched(daemon, notes)
        stored = await story(daemon, notes, keys_under("bob"))  # alice has stored this very prompt
        absent = await story(daemon, notes, keys_under("bob", 10_000))  # nobody has
        assert stored == absent
        assert stored[1] == [("contains", 3)]  # and the tiers were asked
        assert len(stored[0]) == 2

    asyncio.run(run())


def test_the_owner_does_find_it(world):
    """Otherwise the test above would show nothing."""
    daemon, notes = world

    async def run():
        daemon.loop = asyncio.get_running_loop()
        store(daemon, keys_under("alice"), b"alice")
        await until(lambda: at_rest(daemon))
        watched(daemon, notes)
        assert len(daemon.answer(wire.Lookup(7, keys_under("alice")), 2).found) == 3
        assert daemon.answer(wire.Lookup(7, keys_under("")), 2).found == []

    asyncio.run(run())

"""The Mooncake tier against a real master and a process that lends memory."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from ports import free_port

from pdserve import kernels
from pdserve.errors import ConfigError
from pdserve.transfer import wire
from pdserve.transfer.below import Below
from pdserve.transfer.client import CacheClient
from pdserve.transfer.lower import Lower, Rules
from pdserve.transfer.tiers import conformance
from pdserve.transfer.tiers.base import TierError
from pdserve.transfer.tiers.breaker import Guarded
from pdserve.transfer.tiers.conformance import Subject, eventually, is_whole, make_chunk, read, soon
from pdserve.transfer.tiers.mooncake import MooncakeOptions, MooncakeTier
from pdserve.transfer.wipe import Wipe

# Writes a chunk and is killed: while the shards are on their way, or when the record is all that is missing.
KILLED_WRITER = """
import os, signal, sys, threading, time
import msgspec, numpy as np
from pdserve.transfer.tiers import mooncake
from pdserve.transfer.tiers.base import ChunkRecord
record = msgspec.msgpack.decode(sys.stdin.buffer.read(int(sys.argv[3])), type=ChunkRecord)
data = np.frombuffer(sys.stdin.buffer.read(), np.uint8)
n = record.shard_bytes
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
tier = mooncake.MooncakeTier(mooncake.MooncakeOptions(master=sys.argv[1], timeout=20.0))
tier.contains([record.key])
class Fatal:
    def __init__(self, store): self.store = store
    def __getattr__(self, name): return getattr(self.store, name)
    def put(self, *words): die()
    def batch_put_from_multi_buffers(self, *words):
        if sys.argv[2] == "shards": threading.Timer(0.0005, die).start()
        return self.store.batch_put_from_multi_buffers(*words)
tier._store = Fatal(tier._store)
tier.put(record, [data[i * n : (i + 1) * n] for i in range(len(record.digests))], time.monotonic() + 20)
"""


class Quick(MooncakeTier):
    """Connects without asking a child process first: the suite opens many."""

    def _try_in_a_child(self):
        pass


class OverMooncake(Subject):
    shard_sizes = (65536, 1, 70001, 1 << 20)

    def __init__(self, server, client):
        self.server, self.client = server, client
        self.like = SimpleNamespace(_options=MooncakeOptions(master=""))  # for the names that a tier uses
        self.breaks = 0

    def open(self):
        at = {"master": f"127.0.0.1:{self.server.port}", "metrics_port": self.server.metrics_port}
        return Quick(MooncakeOptions(**at, timeout=20.0))

    def break_put(self, tier, record, payload):
        self.breaks += 1
        head = msgspec.msgpack.encode(record)
        when = ["shards", "record"][self.breaks % 2]
        done = subprocess.run(
            [sys.executable, "-P", "-c", KILLED_WRITER, f"127.0.0.1:{self.server.port}", when, str(len(head))],
            input=head + b"".join(part.tobytes() for part in payload),
            timeout=60,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL

    def flip(self, record, position):
        (name, *_) = MooncakeTier._payload_names(self.like, record)
        data = bytearray(self.client.get(name))
        data[position] ^= 1
        assert self.client.remove(name, True) == 0
        assert self.client.put(name, bytes(data)) == 0

    @contextmanager
    def stalled(self, tier):
        usual = tier._options
        tier._options = msgspec.structs.replace(usual, timeout=0.5)
        self.server.stop()
        try:
            yield
        finally:
            self.server.go_on()
            tier._options = usual


@pytest.fixture(scope="module")
def client(mooncake_server):
    store = pytest.importorskip("mooncake.store").MooncakeDistributedStore()
    master = f"127.0.0.1:{mooncake_server.port}"
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", master) == 0
    yield store
    store.close()


@pytest.fixture
def subject(mooncake_server, client):
    return OverMooncake(mooncake_server, client)


@pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
def test_conformance(rule, subject):
    rule(subject)


def test_straight_from_and_to_the_arena(mooncake_server):
    options = MooncakeOptions(master=f"127.0.0.1:{mooncake_server.port}", zero_copy=True, timeout=5.0)
    arena = np.zeros(1 << 20, np.uint8)
    with contextlib.closing(Quick(options)) as tier:
        tier.register(arena)
        record, payload = make_chunk(70_000, 3)
        inside = [arena[i * 80_000 : i * 80_000 + 70_000] for i in range(3)]
        for part, data in zip(inside, payload, strict=True):
            part[:] = data
        assert tier._direct(inside)
        assert not tier._direct(payload)
        assert tier.put(record, inside, soon())
        arena[:] = 0
        assert tier.get(record, inside, soon())
        assert is_whole(record, inside)
        assert not arena[70_000:80_000].any()
        assert is_whole(record, read(tier, record))  # and to memory elsewhere, by way of the buffer
        with pytest.raises(TierError, match="deadline"):
            tier.get(record, inside, time.monotonic() - 1)


def test_a_master_that_lists_nothing_is_named_with_the_option_that_says_where_it_does(mooncake_server, tier):
    tier._options = msgspec.structs.replace(tier._options, metrics_port=mooncake_server.port)  # speaks no HTTP
    with pytest.raises(TierError, match=rf"127.0.0.1:{mooncake_server.port} does not list.*metrics_port="):
        list(tier.listing(soon()))
    tier._options = msgspec.structs.replace(tier._options, metrics_port=free_port())
    with pytest.raises(TierError, match=r"refused.*metrics_port="):
        list(tier.listing(soon()))


def test_deleting_by_tenant_reaches_what_an_earlier_daemon_stored(subject):
    """A new tier over the same pool, as after a restart, that was told of no key."""
    chunks = [make_chunk(512, 1) for _ in range(4)]
    with contextlib.closing(subject.open()) as tier:
        for i, (record, payload) in enumerate(chunks):
            assert tier.put(msgspec.structs.replace(record, tag=b"one" if i % 2 else b"two"), payload, soon())
    done = []
    with contextlib.closing(subject.open()) as tier:
        lower = Lower(Guarded(tier), Rules())
        keys = [record.key for record, _ in chunks]
        picked = {k for k in keys[1::2]}
        outcome = Wipe(Below(None, [lower], {}, done.append)).keys(
            [], lambda records: [r.key for r in records if r.tag == b"one" and r.key in picked]
        )
        assert eventually(lambda: bool(done), 30.0)
        done[0]()
        assert outcome.tiers == {"mooncake": {"deleted": 2}}
        assert [r is not None for r in tier.contains(keys)] == [True, False, True, False]
        lower.close(time.monotonic() + 5)


def test_shards_that_the_pool_evicted_are_a_miss(tier):
    record, payload = make_chunk(1000)
    assert tier.put(record, payload, soon())
    tier._store.remove(tier._payload_names(record)[0], True)
    assert read(tier, record) is None
    assert tier.put(record, payload, soon())
    assert is_whole(record, read(tier, record))


def test_a_record_that_is_none_is_a_miss_and_is_replaced(tier):
    record, payload = make_chunk(1000)
    assert tier.contains([record.key]) == [None]
    assert tier._store.put(tier._record_name(record.key), b"PDKV junk") == 0
    assert tier.contains([record.key]) == [None]
    assert tier.put(record, payload, soon())
    assert tier.contains([record.key]) == [record]


@pytest.mark.parametrize("silent", [False, True], ids=["nobody there", "silent"])
def test_connecting_to_a_dead_master_stops_nobody_else(mooncake_server, silent):
    """The library would hold the interpreter lock for a minute and a half."""
    longest, over = [0.0], threading.Event()

    def watch():
        last = time.monotonic()
        while not over.wait(0.01):
            longest[0], last = max(longest[0], time.monotonic() - last), time.monotonic()

    master = f"127.0.0.1:{mooncake_server.port if silent else 1}"
    watcher = threading.Thread(target=watch)
    watcher.start()
    if silent:
        mooncake_server.stop()
    try:
        conformance.failing.nobody_there_is_an_error(MooncakeTier(MooncakeOptions(master=master, timeout=2.0)))
    finally:
        mooncake_server.go_on()
        over.set()
        watcher.join()
    assert longest[0] < 10.0


def test_the_first_call_connects(mooncake_server):
    record, payload = make_chunk(1000)
    with contextlib.closing(
        MooncakeTier(MooncakeOptions(master=f"127.0.0.1:{mooncake_server.port}", timeout=20.0))
    ) as tier:
        assert tier.put(record, payload, soon())
        assert is_whole(record, read(tier, record))


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    with pytest.raises(ConfigError, match=r"pip install 'pdserve\[mooncake\]'"):
        MooncakeTier(MooncakeOptions(master="h:1"))


def test_a_daemon_lends_its_arena_and_chunks_go_there_and_back_without_a_copy(tmp_path, start_cache, mooncake_server):
    """Two daemons, as on two hosts: the second finds in the pool what the first has stored, byte for byte."""
    rng, shard, written = np.random.default_rng(), 1 << 20, {}
    words = ("--tier", f"{mooncake_server.url}&zero_copy=1")
    first = start_cache(tmp_path, f"test-{os.getpid()}-mc1", 64 << 20, *words)
    client = CacheClient(first.socket, "x")
    for i in range(3):
        key, data = secrets.token_bytes(32), rng.integers(0, 256, (2, shard), dtype=np.uint8)
        (grant,) = client.reserve("w", [wire.ReserveItem(key, b"", 0, 2, shard, 256, b"", 2)], 10)
        written[key] = data
        client.arena.bytes[grant.offset : grant.offset + 2 * shard] = data.reshape(-1)
        client.commit([wire.CommitItem(grant.reservation, *_digests(data))], 10)
        done = (i + 1) * 2 * shard
        assert eventually(lambda n=done: first.status()["tiers"]["mooncake"]["zero_copy_bytes"] == n, 60)
    client.close()
    first.stop()
    second = start_cache(tmp_path, f"test-{os.getpid()}-mc2", 64 << 20, *words)
    client, reply = CacheClient(second.socket, "x"), None
    ends = time.monotonic() + 60
    while reply is None or len(reply.found) < 3:
        assert time.monotonic() < ends, second.status()
        reply = client.lookup(list(written), 10)
        time.sleep(0.02)
    for found, data in zip(reply.found, written.values(), strict=True):
        assert found.tier == "mooncake"
        assert (client.arena.bytes[found.offset : found.offset + 2 * shard] == data.reshape(-1)).all()
    assert second.status()["tiers"]["mooncake"]["zero_copy_bytes"] == 3 * 2 * shard
    client.close()


def _digests(data):
    first, *more = [kernels.digest(part) for part in data]
    return first, more

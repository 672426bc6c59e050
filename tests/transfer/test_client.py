"""The client by itself: what it does without being called, beside a real daemon."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from pdserve import kernels
from pdserve.errors import CacheUnavailable
from pdserve.transfer import wire
from pdserve.transfer.client import CacheClient

SIZE = 1 << 20


def key(i: int) -> bytes:
    return i.to_bytes(32, "little")


def put(client, i):
    data = np.full(SIZE, i, np.uint8)
    (grant,) = client.reserve("w", [wire.ReserveItem(key(i), b"", 0, 1, SIZE, 256)], 10)
    assert grant.status == wire.GRANTED
    client.arena.bytes[grant.offset : grant.offset + SIZE] = data
    client.commit([wire.CommitItem(grant.reservation, kernels.digest(data))], 10)


def right(client, i, found):
    data = client.arena.bytes[found.offset : found.offset + found.shard_bytes]
    return kernels.digest(data) == found.digests[0] and bool((data == i).all())


def until(what, patience=60.0):
    ends = time.monotonic() + patience
    while not what():
        assert time.monotonic() < ends, "it did not come to that"
        time.sleep(0.01)


def on_disk(daemon):
    return daemon.status()["tiers"]["disk"]["chunks"]


@pytest.fixture
def stopped(cache_daemon):
    """Stops the daemon, and lets it go on at the end or when told to."""
    pid = cache_daemon.process.pid
    yield (lambda: os.kill(pid, signal.SIGSTOP)), (lambda: os.kill(pid, signal.SIGCONT))
    os.kill(pid, signal.SIGCONT)


def test_a_killed_daemon_is_connected_to_again_without_any_request_and_hits_from_memory_and_disk(tmp_path, start_cache):
    """Three clients store and look up while the daemon is killed; then nobody calls anything, and yet they are connected."""
    name = f"test-{os.getpid()}-back"
    disk = ("--disk", str(tmp_path / "kv"), "--disk-size", "128MiB", "--disk-min-free", "0")
    first = start_cache(tmp_path, name, 16 << 20, *disk)
    clients = [CacheClient(first.socket, f"engine-{i}") for i in range(3)]
    for i in range(1, 25):  # more than memory holds: the first are on disk alone
        put(clients[0], i)
        until(lambda i=i: on_disk(first) == i)  # what comes faster than the disk is dropped
    stop, went_on = threading.Event(), [0, 0, 0]

    def load(n):
        while not stop.is_set():
            try:
                reply = clients[n].lookup([key(24)], 0.5)
                if reply.lease:
                    clients[n].release(reply.lease, 0.5)
            except CacheUnavailable:
                went_on[n] += 1  # an engine computes instead
                time.sleep(0.005)

    threads = [threading.Thread(target=load, args=(n,)) for n in range(3)]
    for t in threads:
        t.start()
    time.sleep(0.1)
    first.stop(signal.SIGKILL)
    until(lambda: all(went_on))
    stop.set()
    for t in threads:
        t.join(30)
    until(lambda: not any(c.connected for c in clients))
    second = start_cache(tmp_path, name, 16 << 20, *disk)
    until(lambda: all(c.connected for c in clients))
    assert sorted(label.split()[0] for label in second.status()["clients"]) == ["engine-0", "engine-1", "engine-2"]
    until(lambda: second.status()["recovering"] == 0)
    reply = clients[1].lookup([key(24)], 10)
    assert [right(clients[1], 24, f) for f in reply.found] == [True]
    assert reply.found[0].tier == "dram"
    clients[1].release(reply.lease, 10)
    until(lambda: clients[2].lookup([key(1)], 10).found != [])
    (found,) = clients[2].lookup([key(1)], 10).found
    assert (found.tier, right(clients[2], 1, found)) == ("disk", True)
    for client in clients:
        client.close()


def test_the_lease_of_a_lookup_that_was_given_up_goes_back_without_another_call(cache_daemon, stopped):
    stop, go_on = stopped
    client = CacheClient(cache_daemon.socket, "x")
    put(client, 1)
    stop()
    with pytest.raises(CacheUnavailable, match="did not answer within 50 ms"):
        client.lookup([key(1)], 0.05)
    go_on()
    until(lambda: 'pdserve_cache_op_seconds_count{op="lookup"} 1.0' in cache_daemon.get("/metrics"))
    until(lambda: 'pdserve_cache_op_seconds_count{op="release"} 1.0' in cache_daemon.get("/metrics"))
    assert cache_daemon.status()["leases"] == 0
    client.close()


def test_space_that_was_granted_to_a_call_that_gave_up_goes_back(cache_daemon, stopped):
    stop, go_on = stopped
    client = CacheClient(cache_daemon.socket, "x")
    client.ping(10)
    stop()
    with pytest.raises(CacheUnavailable):
        client.reserve("w", [wire.ReserveItem(key(1), b"", 0, 1, SIZE, 256)], 0.05)
    go_on()
    until(lambda: 'pdserve_cache_op_seconds_count{op="abort"} 1.0' in cache_daemon.get("/metrics"))
    status = cache_daemon.status()
    assert (status["reservations"], status["used_bytes"]) == (0, 0)
    time.sleep(1.1)  # calls fail at once for a moment after one that was not answered
    put(client, 1)
    assert len(client.lookup([key(1)], 10).found) == 1  # and no answer is taken for another's
    client.close()


def test_leases_are_released_without_a_wait_and_later_calls_have_their_own_answers(cache_daemon, stopped):
    stop, go_on = stopped
    client = CacheClient(cache_daemon.socket, "x")
    with pytest.raises(CacheUnavailable):
        client.release_soon(1)  # there is no connection yet, so no lease of ours
    put(client, 1)
    leases = [client.lookup([key(1)], 10).lease for _ in range(70)]
    stop()  # and yet it returns
    for lease in leases:
        client.release_soon(lease, 1, SIZE)
    go_on()
    assert len(client.lookup([key(1)], 10).found) == 1
    until(lambda: cache_daemon.status()["leases"] == 1)
    client.close()


def test_prefetch_brings_up_what_memory_has_lost_within_bounds(tmp_path, start_cache):
    """Of 40 chunks in a row on disk at most a quarter of memory is on its way up at once; no lease, and no key is made up."""
    disk = ("--disk", str(tmp_path / "kv"), "--disk-size", "128MiB", "--disk-min-free", "0")
    daemon = start_cache(tmp_path, f"test-{os.getpid()}-pre", 16 << 20, *disk)
    client = CacheClient(daemon.socket, "x")
    for i in range(1, 41):
        put(client, i)
        until(lambda i=i: on_disk(daemon) == i)
    for i in range(100, 116):  # the first 40 leave memory
        put(client, i)
    keys = [key(i) for i in range(1, 41)]
    assert client.prefetch([key(999), *keys], 10) == 0  # the run ends at the first key that is nowhere
    assert client.prefetch(keys[:3], 10) == 3
    until(lambda: client.prefetch(keys[:3], 10) == 0)
    assert client.prefetch(keys, 10) > 0
    assert daemon.status()["tiers"]["disk"]["queued_up"] <= 4
    assert daemon.status()["leases"] == 0
    metrics = daemon.get("/metrics")
    moved = [x for x in metrics.splitlines() if x.startswith('pdserve_cache_tier_tokens_total{direction="up",tier="disk"}')]
    assert float(moved[0].split()[1]) >= 3 * 256
    reply = client.lookup(keys[:3], 10)
    assert [(f.tier, right(client, i, f)) for i, f in enumerate(reply.found, 1)] == [("disk", True)] * 3
    client.close()


def test_closing_ends_the_thread_and_the_files(cache_daemon):
    def mine():
        return [t for t in threading.enumerate() if t.name == "pdserve-cache-closer"]

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        client = CacheClient(cache_daemon.socket, "closer")
        client.ping(10)
        assert len(mine()) == 1
        client.close()
        client.close()
        assert mine() == []
        with pytest.raises(CacheUnavailable, match="is closed"):
            client.ping(1)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_client_that_nobody_answers_can_be_closed(tmp_path):
    client = CacheClient(tmp_path / "none.sock", "x")
    with pytest.raises(CacheUnavailable):
        client.connect(0.05)
    client.close()
    assert not client.connected

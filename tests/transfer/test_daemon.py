"""The real daemon over a real socket and real shared memory: what engines and operators meet."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pdserve import kernels
from pdserve.errors import CacheUnavailable
from pdserve.transfer import wire
from pdserve.transfer.client import CacheClient
from pdserve.transfer.mapping import huge_page

CHUNK = 1 << 20


def key(i: int) -> bytes:
    return i.to_bytes(32, "little")


def store(client: CacheClient, i: int, data: np.ndarray, parent: bytes = b"") -> bool:
    (grant,) = client.reserve("w", [wire.ReserveItem(key(i), parent, 0, 1, data.size, 256)], 30)
    if grant.status != wire.GRANTED:
        return False
    client.arena.bytes[grant.offset : grant.offset + data.size] = data
    client.commit([wire.CommitItem(grant.reservation, kernels.digest(data))], 30)
    return True


def load(client: CacheClient, i: int) -> np.ndarray | None:
    reply = client.lookup([key(i)], 30)
    if not reply.found:
        return None
    (f,) = reply.found
    data = client.arena.bytes[f.offset : f.offset + f.shard_bytes].copy()
    assert kernels.digest(data) == f.digests[0]
    client.release(reply.lease, 30, 1, data.size)
    return data


def test_bytes_written_by_one_client_are_read_by_another(cache_daemon):
    rng = np.random.default_rng()
    a, b = CacheClient(cache_daemon.socket, "a"), CacheClient(cache_daemon.socket, "b")
    chunks = {i: rng.integers(0, 256, CHUNK, dtype=np.uint8) for i in range(8)}
    for i, data in chunks.items():
        assert store(a, i, data)
        assert not store(b, i, data)
    for i, data in chunks.items():
        assert (load(b, i) == data).all()
    assert load(b, 99) is None
    metrics = cache_daemon.get("/metrics")
    assert "pdserve_cache_stored_chunks_total 8.0" in metrics
    assert "pdserve_cache_stored_tokens_total 2048.0" in metrics
    assert 'pdserve_cache_loaded_tokens_total{tier="dram"} 2048.0' in metrics
    assert "pdserve_cache_scrub_progress 1.0" in metrics
    assert 'pdserve_cache_loaded_chunks_total{tier="dram"} 8.0' in metrics
    listed = json.loads(cache_daemon.get("/cache/objects?limit=3"))
    assert (listed["total"], len(listed["objects"]), listed["objects"][0]["tokens"]) == (8, 3, 256)
    a.close()
    b.close()


def test_a_client_that_dies_leaves_no_lease_and_no_reservation(cache_daemon):
    code = (
        "import os,sys\nfrom pdserve.transfer.client import CacheClient\nfrom pdserve.transfer import wire\n"
        f"c=CacheClient({str(cache_daemon.socket)!r},'dies')\n"
        "k=[i.to_bytes(32,'little') for i in range(2)]\n"
        "g=c.reserve('w',[wire.ReserveItem(k[0],b'',0,1,4096,256)],30)\nc.commit([wire.CommitItem(g[0].reservation,1)],30)\n"
        "c.reserve('w',[wire.ReserveItem(k[1],b'',0,1,4096,256)],30)\nassert c.lookup(k,30).pending==1\n"
        "print('ready',flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "ready\n"
        before = cache_daemon.status()
        assert (before["leases"], before["reservations"], len(before["clients"])) == (1, 1, 1)
        child.kill()
    deadline = time.monotonic() + 60
    while (after := cache_daemon.status())["clients"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (after["leases"], after["reservations"], after["chunks"], after["used_bytes"]) == (0, 0, 1, 4096)


def test_the_arena_lies_where_huge_pages_can_be_mapped_and_the_status_says_how_many(cache_daemon):
    client = CacheClient(cache_daemon.socket, "a")
    assert client.lookup([key(1)], 30).found == []
    assert client.arena.bytes.ctypes.data % max(huge_page(), 4096) == 0
    said = cache_daemon.status()["huge_bytes"]
    assert said == client.arena.huge_bytes()
    client.close()
    assert f"{said / 2**30:.2f} of them in huge pages" in cache_daemon.log.read_text()


def test_no_daemon_is_one_quick_error_and_one_warning(tmp_path, caplog):
    client = CacheClient(tmp_path / "none.sock", "x")
    for _ in range(3):
        with pytest.raises(CacheUnavailable):
            client.lookup([key(1)], 0.05)
    assert [r.levelname for r in caplog.records if r.name == "pdserve.cache-client"].count("WARNING") <= 1


def test_a_client_reconnects_to_a_new_daemon_by_itself(tmp_path, start_cache):
    name = f"test-{os.getpid()}-re"
    first = start_cache(tmp_path, name)
    client = CacheClient(first.socket, "x")
    assert store(client, 1, np.zeros(4096, np.uint8))
    old = client.daemon_id
    first.stop(signal.SIGKILL)
    with pytest.raises(CacheUnavailable):
        client.lookup([key(1)], 1)
    second = start_cache(tmp_path, name)
    deadline = time.monotonic() + 60
    while True:
        try:
            if (got := load(client, 1)) is not None:  # a miss until its digest is verified, then a hit again
                break
            time.sleep(0.01)
        except CacheUnavailable:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert (got == 0).all()
    assert client.daemon_id not in ("", old)
    client.close()
    second.stop()
    assert not list(Path("/dev/shm").glob(f"pdserve-{name}.*"))


def test_a_hung_daemon_costs_one_deadline_and_then_nothing(cache_daemon):
    client = CacheClient(cache_daemon.socket, "x")
    assert store(client, 1, np.zeros(4096, np.uint8))
    os.kill(cache_daemon.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(CacheUnavailable, match="did not answer within 50 ms"):
            client.lookup([key(1)], 0.05)
        with pytest.raises(CacheUnavailable, match="a moment ago"):
            client.lookup([key(1)], 5)
    finally:
        os.kill(cache_daemon.process.pid, signal.SIGCONT)
    time.sleep(1.1)
    assert client.lookup([key(9)], 30).found == []  # the late answer to the first call is not taken for this one's
    client.ping(30)
    deadline = time.monotonic() + 60
    while cache_daemon.status()["leases"]:  # and the lease that it brought goes back
        assert time.monotonic() < deadline
        time.sleep(0.05)
    client.close()


def test_garbage_and_wrong_versions_are_refused_in_words_and_hurt_nobody(cache_daemon):
    good = CacheClient(cache_daemon.socket, "good")
    good.ping(30)

    def talk(data: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(60)
            s.connect(str(cache_daemon.socket))
            s.sendall(data)
            return s.recv(65536)

    def refusal(data: bytes) -> str:
        reply = wire.decode_reply(talk(data)[4:])
        assert isinstance(reply, wire.Refused)
        return reply.reason

    assert f"version {wire.VERSION}, the client 99" in refusal(wire.encode(wire.Hello(99, "old", 1)))
    assert "first message must be a greeting" in refusal(wire.encode(wire.Ping(1)))
    assert "over the bound" in refusal(b"GET / HTTP/1.1\r\n\r\n")
    assert "not a request" in refusal(b"\x02\x00\x00\x00\xc1\xc1")
    good.ping(30)
    good.close()


def test_the_socket_is_its_owners_alone_and_a_second_daemon_is_refused(cache_daemon, tmp_path, start_cache):
    assert cache_daemon.socket.stat().st_mode & 0o777 == 0o600
    assert Path(f"/dev/shm/pdserve-{cache_daemon.name}.arena").stat().st_mode & 0o777 == 0o600
    with pytest.raises(AssertionError, match="another cache daemon already serves"):
        start_cache(tmp_path, cache_daemon.name)
    cache_daemon.get("/healthz")


def test_nothing_is_left_after_a_graceful_stop(tmp_path, start_cache):
    running = start_cache(tmp_path, f"test-{os.getpid()}-stop")
    running.stop()
    assert running.process.returncode == 0
    assert not running.socket.exists()
    assert not Path(f"/dev/shm/pdserve-{running.name}.arena").exists()


def test_concurrent_clients_see_only_whole_chunks(cache_daemon):
    """Six clients store and load the same forty keys at once; every load is digest-checked, the cache is too small for all."""
    errors, loaded = [], []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        client = CacheClient(cache_daemon.socket, f"c{seed}")
        try:
            for _ in range(150):
                i = int(rng.integers(40))
                data = np.full(2 * CHUNK, i, np.uint8)
                got = load(client, i)
                if got is None:
                    store(client, i, data)
                else:
                    loaded.append(i)
                    assert (got == data).all()
        except Exception as e:
            errors.append(e)
            raise
        finally:
            client.close()

    threads = [threading.Thread(target=work, args=(s,)) for s in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert not errors
    assert loaded
    deadline = time.monotonic() + 60
    while (status := cache_daemon.status())["clients"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (status["leases"], status["reservations"]) == (0, 0)


def test_file_descriptors_and_memory_stay_flat_over_many_operations(cache_daemon):
    client = CacheClient(cache_daemon.socket, "x")

    def work(n: int) -> None:
        for i in range(n):
            store(client, i, np.zeros(65536, np.uint8))
            load(client, i)

    work(1500)
    rss, fds = cache_daemon.weight()
    work(6000)
    after = cache_daemon.weight()
    assert after[1] <= fds + 1
    assert after[0] < rss + 16 * 1024
    client.close()

"""The daemon's HTTP side and its command, over a real daemon with a disk tier."""

import errno
import json
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ports import free_port
from starlette.testclient import TestClient

from pdserve import __main__ as command
from pdserve import kernels
from pdserve.chunk import tenant_tag
from pdserve.errors import ConfigError, StartError
from pdserve.transfer import admin, arena, fsck, wire
from pdserve.transfer import serving as serve
from pdserve.transfer.below import Below
from pdserve.transfer.catalog import Catalog
from pdserve.transfer.client import CacheClient
from pdserve.transfer.lower import Lower, Rules
from pdserve.transfer.tiers.base import ChunkRecord
from pdserve.transfer.tiers.breaker import Guarded
from pdserve.transfer.tiers.disk import DiskTier
from pdserve.transfer.tiers.memory import MemoryTier
from pdserve.transfer.wipe import CANNOT_LIST, Wipe

SIZE = 1 << 20


def key(i):
    return i.to_bytes(32, "little")


@pytest.fixture
def serving(tmp_path, monkeypatch):
    """A daemon in a process of its own, its client, and what asks it."""
    from multiprocessing import get_context

    name = f"test-{os.getpid()}-{time.monotonic_ns()}"
    port = free_port()
    args = SimpleNamespace(
        socket=str(tmp_path / "c.sock"), size=32 << 20, chunk_tokens=256, admin_host="127.0.0.1", admin_port=port, name=name,
        disk=str(tmp_path / "kv"), disk_size=128 << 20, disk_min_free=0, disk_write="write-through", scrub_rate=0,
    )  # fmt: skip
    process = get_context("spawn").Process(target=serve.main, args=(args,))
    process.start()

    def ask(method, path, body=None):
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    client = CacheClient(args.socket, "t")
    _until(lambda: _works(lambda: ask("GET", "/healthz")), 90)
    yield SimpleNamespace(ask=ask, client=client, port=port, process=process, folder=tmp_path / "kv")
    client.close()
    process.terminate()
    process.join(60)
    process.close()
    arena.path_for(name).unlink(missing_ok=True)


def _works(call):
    try:
        call()
    except OSError:
        return False
    return True


def _until(what, patience=60.0):
    ends = time.monotonic() + patience
    while not what():
        assert time.monotonic() < ends, "it did not come to that"
        time.sleep(0.02)


def put(client, i, parent=0, tag=b""):
    data = np.full(SIZE, i % 251, np.uint8)
    item = wire.ReserveItem(key(i), key(parent) if parent else b"", 0, 1, SIZE, 256, tag)
    (g,) = client.reserve("w", [item], 30)
    assert g.status == wire.GRANTED
    client.arena.bytes[g.offset : g.offset + SIZE] = data
    client.commit([wire.CommitItem(g.reservation, kernels.digest(data))], 30)
    return g.offset


def hits(client, *ids):
    """How long a run is found, waiting for what is on its way up."""
    ends = time.monotonic() + 60
    while True:
        reply = client.lookup([key(i) for i in ids], 30)
        for i, f in zip(ids, reply.found, strict=False):
            assert (client.arena.bytes[f.offset : f.offset + SIZE] == i % 251).all()
        if reply.lease:
            client.release(reply.lease, 30, len(reply.found), 0)
        if not reply.loading:
            return len(reply.found)
        assert time.monotonic() < ends
        time.sleep(0.005)


def deleted(here, on_disk):
    return {"dropped": here, "tiers": {"disk": {"deleted": on_disk}}, "pending": [], "finished": True}


def test_what_is_deleted_is_gone_from_every_tier(serving):
    a, b = tenant_tag("tenant-a"), tenant_tag("tenant-b")
    for i in (1, 2, 3):
        put(serving.client, i, i - 1, a)
    _until(lambda: serving.ask("GET", "/cache/stats")["disk"]["chunks"] == 3)  # the queue holds an eighth of the arena
    for i in (11, 12, 13):
        put(serving.client, i, i - 1 if i > 11 else 0, b)
    _until(lambda: serving.ask("GET", "/cache/stats")["disk"]["chunks"] == 6)
    assert serving.ask("DELETE", "/cache?salt=tenant-a") == deleted(3, 3)
    assert hits(serving.client, 1) == 0
    assert serving.ask("DELETE", "/cache?prefix=" + key(12).hex()) == deleted(2, 2)
    assert hits(serving.client, 11, 12, 13) == 1
    assert [o["key"] for o in serving.ask("GET", "/cache/objects?tier=disk")["objects"]] == [key(11).hex()]
    assert serving.ask("DELETE", "/cache") == deleted(1, 1)
    assert hits(serving.client, 11) == 0
    for wrong in ("/cache?salt=", "/cache?prefix=xyz"):
        with pytest.raises(urllib.error.HTTPError, match="422"):
            serving.ask("DELETE", wrong)


def test_prefetch_brings_up_what_memory_has_lost(serving):
    for i in range(1, 60):  # memory holds 32
        put(serving.client, i)
        if i % 3 == 0:
            time.sleep(0.02)
    _until(lambda: serving.ask("GET", "/status")["tiers"]["disk"]["queued_down"] == 0)
    keys = {"keys": [key(1).hex()]}
    _until(lambda: serving.ask("POST", "/cache/prefetch", keys)["loading"] == 0)
    assert serving.ask("GET", "/cache/objects?limit=3")["total"] >= 30
    reply = serving.client.lookup([key(1)], 30)
    assert [f.tier for f in reply.found] == ["disk"]


def test_a_scrub_finds_what_has_changed_in_memory_and_on_disk(serving):
    offset = put(serving.client, 1)
    put(serving.client, 2)
    _until(lambda: serving.ask("GET", "/cache/stats")["disk"]["chunks"] == 2)
    serving.client.arena.bytes[offset + 77] ^= 4
    (segment,) = serving.folder.glob("*.seg")
    with segment.open("r+b") as f:
        f.seek(segment.stat().st_size - 5)
        f.write(b"\x99")
    serving.ask("POST", "/cache/scrub?fast=true")
    _until(lambda: serving.ask("GET", "/status")["scrub"]["passes"] == 1)
    assert serving.ask("GET", "/status")["scrub"]["corrupt"] == 2
    stats = serving.ask("GET", "/cache/stats")
    assert (stats["dram"]["chunks"], stats["disk"]["chunks"], stats["disk"]["quarantined_chunks"]) == (1, 1, 1)
    assert hits(serving.client, 1) == 1  # from the disk, whose copy is sound
    assert hits(serving.client, 2) == 1


def test_the_command_asks_the_daemon(serving, capsys):
    put(serving.client, 1)
    put(serving.client, 2, 1)
    at = ["--admin-port", str(serving.port)]
    _until(lambda: serving.ask("GET", "/cache/stats")["disk"]["chunks"] == 2)
    assert command.main(["cache", "ls", *at]) == 0
    assert command.main(["cache", "ls", "--tier", "disk", *at]) == 0
    listed = capsys.readouterr().out
    assert f"{key(2).hex()}     256  1.0" in listed
    assert all(len(line) <= 80 for line in listed.splitlines())
    assert command.main(["cache", "pin", key(2).hex(), "--seconds", "60", *at]) == 0
    assert "2 chunks pinned for 60 s" in capsys.readouterr().out
    assert command.main(["cache", "status", *at]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^pinned_bytes +{2 * SIZE}\s*$", out, re.MULTILINE)
    assert "chunks 2, used_bytes" in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.splitlines())
    assert command.main(["cache", "pin", "--undo", key(2).hex(), key(1).hex(), *at]) == 0
    assert command.main(["cache", "scrub", "--fast", *at]) == 0
    assert command.main(["cache", "ls", "--tier", "nowhere", *at]) == 1
    assert command.main(["cache", "pin", "abc", *at]) == 1
    assert "pdserve: the cache daemon refused (422): keys[0]: 'abc': give 64" in capsys.readouterr().err
    assert command.main(["cache", "check", str(serving.folder)]) == 1
    assert "a cache daemon uses" in capsys.readouterr().err
    assert command.main(["cache", "clear", *at]) == 0
    assert "2 chunks dropped from memory\n2 from disk" in capsys.readouterr().out
    assert serving.ask("POST", "/loglevel", {"level": "warning"}) == serving.ask("GET", "/loglevel")
    assert serving.ask("GET", "/config")["tiers"]["disk"]["write"] == "write-through"


def test_check_names_every_problem_and_repairs_on_demand(tmp_path):
    folder = tmp_path / "kv"
    with pytest.raises(StartError, match="holds no disk tier"):
        fsck.check(folder)
    tier = DiskTier(folder, 64 << 20, min_free=0)
    from pdserve.transfer.tiers.conformance import make_chunk, soon

    chunks = [make_chunk(8192, 2) for _ in range(6)]
    for record, payload in chunks:
        tier.put(record, payload, soon())
    tier.delete([chunks[5][0].key])
    tier.close()
    clean = fsck.check(folder)
    assert (clean.segments, clean.chunks, clean.deleted, clean.problems) == (1, 5, 1, [])
    (file,) = folder.glob("*.seg")
    with file.open("r+b") as f:
        f.seek(4096 * 2 + 3)  # the first chunk's bytes
        f.write(b"\xff\x00\xff")
        f.seek(4096 * 6 + 30)  # the second chunk's header
        f.write(b"\xff\x00\xff")
        f.seek(0, 2)
        f.write(b"torn")
    (folder / "00000009.seg").write_bytes(b"nothing")
    found = fsck.check(folder)
    assert found.chunks == 3
    text = "\n".join(found.problems)
    for words in (
        "digest mismatch at 4096",
        "damaged header at 24576",
        "torn tail of 4 bytes",
        "00000009.seg: not a segment",
    ):
        assert words in text
    repaired = fsck.check(folder, repair=True)
    assert repaired.repaired == 3  # the damaged header's region stays as it is, skipped
    again = fsck.check(folder)
    assert again.problems == [p for p in found.problems if "damaged header" in p]
    tier = DiskTier(folder, 64 << 20, min_free=0)
    assert tier.stats()["chunks"] == 3
    tier.close()


def test_check_looks_at_a_disk_that_is_read_only_but_does_not_repair_it(tmp_path, monkeypatch):
    tier = DiskTier(tmp_path, 64 << 20, min_free=0)
    tier.close()
    real = os.open

    def read_only(path, flags, *more, **named):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", read_only)
    assert fsck.check(tmp_path).problems == []
    with pytest.raises(StartError, match="cannot be repaired: Read-only file system"):
        fsck.check(tmp_path, repair=True)


@pytest.mark.parametrize(
    ("method", "path", "body", "sentence"),
    [
        ("POST", "/cache/pin", {"keys": ["zz"]}, "keys[0]: 'zz': give 64 hexadecimal digits"),
        ("POST", "/cache/pin", {"ttl_s": -1}, "ttl_s: -1: input should be greater than 0"),
        ("POST", "/cache/prefetch", None, "body: field required"),
        ("POST", "/loglevel", {"level": "x"}, "level: 'x': input should be 'debug', 'info', 'warning' or 'error'"),
        ("DELETE", "/cache?prefix=12", None, "prefix: '12': give 64 hexadecimal digits"),
        ("GET", "/cache/objects?limit=0", None, "limit: '0': input should be greater than or equal to 1"),
        ("GET", "/cache/objects?tier=s3", None, "tier: no tier 's3' here that can be listed. Known: dram, disk."),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence_that_names_it(method, path, body, sentence):
    lowers = [
        SimpleNamespace(name="disk", tier=SimpleNamespace(records=list)),
        SimpleNamespace(name="redis", tier=None),
    ]
    daemon = SimpleNamespace(catalog=Catalog(None, SimpleNamespace(lowers=lowers)))
    answer = TestClient(admin.make_app(daemon)).request(method, path, json=body)
    assert answer.status_code in (404, 422)
    assert answer.json()["detail"].startswith(sentence)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["serve", "--socket", "s", "--size", "1MiB", "--admin-port", "99999"], "--admin-port: 99999 is no port"),
        (["serve", "--socket", "s", "--size", "1MiB", "--chunk-tokens", "1048576"], "--chunk-tokens: 1048576 is over"),
    ],
)
def test_the_command_refuses_numbers_that_cannot_be(words, why, capsys):
    assert command.main(["cache", *words]) != 0
    assert why in capsys.readouterr().err


def test_with_a_token_only_health_is_open():
    client = TestClient(admin.make_app(SimpleNamespace(status=lambda: {}), "s3cret"))
    assert client.get("/healthz").status_code == 200
    for wrong in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Bearer é".encode()}):
        assert client.get("/status", headers=wrong).status_code == 401
        assert client.delete("/cache", headers=wrong).status_code == 401
    assert client.get("/status", headers={"Authorization": "Bearer s3cret"}).status_code == 200


def test_bound_off_loopback_without_a_token_nothing_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("PDSERVE_ADMIN_TOKEN", raising=False)
    args = SimpleNamespace(
        socket=str(tmp_path / "c.sock"), size=1 << 20, chunk_tokens=256, admin_host="0.0.0.0", admin_port=1, name="x"
    )
    with pytest.raises(ConfigError, match="PDSERVE_ADMIN_TOKEN"):
        serve.main(args)
    assert not Path("/dev/shm/pdserve-x.arena").exists()


@pytest.fixture
def two_hosts(tmp_path, start_cache):
    """Two daemons over one shared directory, as on two hosts, and a client of each."""
    (tmp_path / "shared").mkdir()
    caches = []
    for n in "ab":
        (tmp_path / n).mkdir()
        words = ("--tier", f"file://{tmp_path / 'shared'}")
        caches.append(start_cache(tmp_path / n, f"test-{os.getpid()}-{time.monotonic_ns()}-{n}", 32 << 20, *words))
    clients = [CacheClient(cache.socket, "t") for cache in caches]
    yield caches, clients
    for client in clients:
        client.close()


def test_a_tenants_chunks_go_from_a_shared_tier_also_where_another_host_stored_them(two_hosts, capsys):
    (a, b), (client_a, client_b) = two_hosts
    mine, other = tenant_tag("mine"), tenant_tag("other")

    def below(count):
        line = f'pdserve_cache_tier_chunks_total{{direction="down",tier="fs"}} {count}.0'
        _until(lambda: line in a.get("/metrics"))  # the queue holds an eighth of the arena

    for i in (1, 2, 3):
        put(client_a, i, i - 1, mine)
    below(3)
    for i in (11, 12, 13):
        put(client_a, i, i - 1 if i > 11 else 0, other)
    below(6)

    def delete(path):
        request = urllib.request.Request(f"http://127.0.0.1:{b.port}{path}", method="DELETE")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    # The second host has none of them in memory.
    gone = {"dropped": 0, "tiers": {"fs": {"deleted": 3}}, "pending": [], "finished": True}
    assert delete("/cache?salt=mine") == gone
    assert hits(client_b, 1) == 0
    assert delete(f"/cache?prefix={key(12).hex()}")["tiers"] == {"fs": {"deleted": 2}}
    _until(lambda: hits(client_b, 11, 12, 13) == 1)
    everything = delete("/cache")
    assert everything["tiers"]["fs"]["deleted"] == 0
    assert "shared with other hosts" in everything["tiers"]["fs"]["left"]
    put(client_b, 21)
    below_b = 'pdserve_cache_tier_chunks_total{direction="down",tier="fs"} 1.0'
    _until(lambda: below_b in b.get("/metrics"))
    assert command.main(["cache", "clear", "--shared", "--admin-port", str(a.port)]) == 0
    assert "2 from fs" in capsys.readouterr().out
    assert hits(client_b, 11) == 0


def test_a_tier_that_cannot_list_says_what_is_left():
    class NoListing(MemoryTier):
        listing = None

    done = []
    tier = NoListing()
    lower = Lower(Guarded(tier), Rules())
    record = ChunkRecord(1, key(1), b"", 256, 8, [1], b"t")
    tier.put(record, [np.zeros(8, np.uint8)], time.monotonic() + 5)
    outcome = Wipe(Below(None, [lower], {}, done.append)).keys([key(1), key(2)], lambda records: [])
    _until(lambda: done)
    done[0]()
    lower.close(time.monotonic() + 5)
    assert outcome.pending == set()
    assert outcome.tiers == {"memory": {"deleted": 1, "left": CANNOT_LIST}}

"""The cache daemon and its disk tier, each figure beside its baseline from the same run.

    python tests/bench/bench_tiers.py [--quick] [--folder DIR] [--index-gb N] [--json FILE]

lookup, reserve+commit of 400 chunks (a prompt of 100k tokens) beside a bare ping over the same socket; lookups while
others keep a full arena under store pressure, beside the same lookups when idle, beside those of a daemon that is idle while
another one just like it has the same pressure (what the machine alone makes of it), and beside a bare ping of either; the
disk tier's put and get beside plain
O_DIRECT writes and reads of the same sizes on the same file system, taken in turns, and dd beside both; how long a start
takes with N GB of segments, from the index file and from the headers alone. Times in microseconds.

For the start the segments are sparse files: headers are on the disk as they would be, payloads are holes, since a start
reads no payload. Their pages are dropped from the cache first, and headers are read past it (O_DIRECT) anyway.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from running_cache import RunningCache

from pdserve import kernels
from pdserve.chunk import FORMAT_VERSION
from pdserve.transfer import wire
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.client import CacheClient
from pdserve.transfer.lower import MOST_TOGETHER, TOGETHER_BYTES
from pdserve.transfer.tiers import segments
from pdserve.transfer.tiers.base import ChunkRecord
from pdserve.transfer.tiers.disk import DiskTier

CHUNKS = 400
SHARD = 65536


def keys(start: int, count: int) -> list[bytes]:
    return [(start + i).to_bytes(32, "little") for i in range(count)]


@contextlib.contextmanager
def daemon(folder: Path, size: int, *words: str) -> Iterator[tuple[RunningCache, CacheClient]]:
    """One of its own, and a client of it; gone when the block is left."""
    env = {"PDSERVE_LOG_LEVEL": "error"}
    cache = RunningCache(
        folder, f"bench-{os.getpid()}-{time.monotonic_ns()}", size, "--scrub-rate", "0", *words, env=env
    )
    client = CacheClient(cache.socket, "bench")
    try:
        client.connect(30)
        yield cache, client
    finally:
        client.close()
        cache.stop()


def timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6


def row(name: str, times: list[float], **more: float) -> dict[str, Any]:
    return {"row": name, "p50": statistics.median(times), "p99": statistics.quantiles(times, n=100)[98], **more}


def store(client: CacheClient, names: list[bytes], payload: np.ndarray | None = None) -> int:
    """Without a payload only what goes over the socket, which is what is measured there."""
    items = [wire.ReserveItem(k, names[i - 1] if i else b"", 0, 1, SHARD, 256) for i, k in enumerate(names)]
    granted = [g for g in client.reserve("w", items, 30) if g.status == wire.GRANTED]
    digest = 1
    if payload is not None and client.arena is not None:
        digest = kernels.digest(payload)
        for grant in granted:
            client.arena.bytes[grant.offset : grant.offset + SHARD] = payload
    return client.commit([wire.CommitItem(g.reservation, digest) for g in granted], 30)


def lookup(client: CacheClient, names: list[bytes]) -> None:
    """Without the release: that is a call of its own."""
    reply = client.lookup(names, 30)
    client.__dict__.setdefault("leases", []).append((reply.lease, len(reply.found)))


def release(client: CacheClient) -> None:
    for lease, _ in client.__dict__.pop("leases", []):
        client.release(lease, 30)


def operations(folder: Path, rounds: int) -> list[dict[str, Any]]:
    with daemon(folder, 1 << 30) as (_, client):
        hot, absent = keys(1, CHUNKS), keys(10**9, CHUNKS)
        store(client, hot)
        found: dict[str, list[float]] = {
            "ping": [],
            "lookup 400, all found": [],
            "lookup 400, none": [],
            "reserve+commit 400": [],
        }
        for n in range(rounds + 20):
            took = {"ping": timed(lambda: client.ping(30)), "lookup 400, all found": timed(lambda: lookup(client, hot))}
            release(client)
            took["lookup 400, none"] = timed(lambda: lookup(client, absent))
            release(client)
            fresh = keys((n + 2) * 10**6, CHUNKS)
            took["reserve+commit 400"] = timed(lambda f=fresh: store(client, f))  # type: ignore[misc]
            if n >= 20:
                for name, value in took.items():
                    found[name].append(value)
    ping = statistics.median(found["ping"])
    return [row(name, times, ratio=statistics.median(times) / ping) for name, times in found.items()]


def write_on_demand(path: str, chunks: int, pause: float, go: Any, stop: Any) -> None:
    """Another engine, in a process of its own: stores new chunks, so many a call, with so many seconds between calls, while `go`
    is set."""
    client, payload, n = CacheClient(path, "writer"), np.full(SHARD, 7, np.uint8), 1
    while not stop.is_set():
        if go.wait(0.1):
            n += 1
            store(client, keys((n * 1000 + chunks) * 10**6, chunks), payload)
            time.sleep(pause)
    client.close()


def pressure(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """A full arena with a disk tier below; one client looks 40 chunks up, and pings, while another process does nothing, stores
    into this daemon (8 chunks a call, as an engine with steps of 2048 tokens, or 400 at once, both at some 3000 chunks a second;
    or 32 a call, steps of 8192 tokens, 30 times a second: as eight engines that each prefill 30,000 tokens a second), or stores
    into another daemon just like it: what the machine alone makes of that."""
    spawn = get_context("spawn")
    stop = spawn.Event()
    arms = ("idle", "another daemon under store pressure", "under store pressure", "32 chunks a call, 30 a second", "400 chunks a call")
    found: dict[str, list[float]] = {name: [] for name in arms}
    pings: dict[str, list[float]] = {name: [] for name in arms}
    under = 0.0
    with contextlib.ExitStack() as stack:
        caches, goes, writers = [], {}, []
        for _ in range(2):
            own = folder / f"arm-{len(caches)}"
            own.mkdir()
            words = ("--disk", str(own / "kv"), "--disk-size", "512MiB", "--disk-min-free", "0")
            caches.append(stack.enter_context(daemon(own, 256 << 20, *words)))
        writes = ((caches[0], 8, 0.002), (caches[1], 8, 0.002), (caches[1], 32, 1 / 30), (caches[1], 400, 0.1))
        for name, ((cache, _), chunks, pause) in zip(arms[1:], writes, strict=True):
            goes[name] = spawn.Event()
            writers.append(spawn.Process(target=write_on_demand, args=(str(cache.socket), chunks, pause, goes[name], stop)))
            writers[-1].start()
        hot = keys(1, 40)
        for _, client in caches:
            fill(client, hot)
        stored = 0.0
        try:
            for block in range(len(arms) * max(16, rounds // 25)):  # a p99 of 800 lookups each, at least
                arm = arms[block % len(arms)]
                before = metric(caches[1][0].get("/metrics"), "pdserve_cache_stored_bytes_total")
                for name, go in goes.items():
                    (go.set if name == arm else go.clear)()
                time.sleep(0.2)
                began = time.perf_counter()
                for _ in range(50):
                    found[arm].append(timed(lambda: lookup(client, hot)))
                    release(client)
                    time.sleep(0.001)
                    pings[arm].append(timed(lambda: client.ping(30)))
                    time.sleep(0.001)
                if arm == arms[2]:
                    under += time.perf_counter() - began + 0.2
                    stored += metric(caches[1][0].get("/metrics"), "pdserve_cache_stored_bytes_total") - before
        finally:
            stop.set()
            for writer in writers:
                writer.join(20)
    rows = [row(f"lookup 40, {name}", times) for name, times in found.items()]
    beside = [row(f"ping, {name}", times) for name, times in pings.items()]
    for some in (rows, beside):
        for r in some[1:]:
            r["p99 ratio"] = r["p99"] / some[0]["p99"]
        for r in some[2:]:
            r["of the other daemon's"] = r["p99"] / some[1]["p99"]
    for r, ping in zip(rows, beside, strict=True):
        r["p99 of ping's"] = r["p99"] / ping["p99"]
    rows[2]["stored meanwhile, MB/s"] = stored / under / 1e6
    return rows + beside


def fill(client: CacheClient, hot: list[bytes]) -> None:
    """Until the arena has long been full; `hot` is in use and so the last to go."""
    payload = np.full(SHARD, 7, np.uint8)
    store(client, hot, payload)
    for n in range(700):
        store(client, keys((10**6 + n) * 10**6, 8), payload)
        lookup(client, hot)
        release(client)


def metric(metrics: str, name: str) -> float:
    return next(float(line.split()[1]) for line in metrics.splitlines() if line.startswith(name + " "))


# ---- the disk tier ----


def disk(folder: Path, rounds: int, shard: int) -> list[dict[str, Any]]:
    """put and get of one chunk in turns with a plain write and read of as many bytes, each growing its own file; who is
    first changes every time. dd writes and reads as many bytes by itself, before and after."""
    folder.mkdir()
    tier = DiskTier(folder / "disk", 4 << 30, min_free=0)
    data = segments.aligned(shard)
    data[:] = np.random.default_rng(1).integers(0, 256, shard, dtype=np.uint8)
    digest = kernels.digest(data)
    fd, _ = segments.open_file(str(folder / "plain"), os.O_RDWR | os.O_CREAT)
    soon = time.monotonic() + 600
    times: dict[str, list[float]] = {"plain write": [], "put": [], "plain read": [], "get": [], "get + digest": []}
    records = [ChunkRecord(FORMAT_VERSION, k, b"", 256, shard, [digest]) for k in keys(1, rounds)]
    dd = [_dd(folder, rounds, shard)]
    together = min(MOST_TOGETHER, -(-TOGETHER_BYTES // shard))  # as the daemon writes what waits
    for i, record in enumerate(records):
        calls = [
            ("plain write", lambda i=i: os.pwritev(fd, [data.data], i * shard)),
            ("put", lambda r=record: tier.put(r, [data], soon)),
        ]
        for name, call in calls[:: 1 if i % 2 else -1]:
            times[name].append(timed(call))
    several: list[tuple[float, float]] = []  # plain writes, and the same number of chunks at once
    at = rounds * shard
    for n in range(rounds // together):
        group = [
            (ChunkRecord(FORMAT_VERSION, k, b"", 256, shard, [digest]), [data]) for k in keys(10**6 + n * 100, together)
        ]

        def plainly(at: int = at) -> None:
            for i in range(together):
                os.pwritev(fd, [data.data], at + i * shard)

        pair = [plainly, lambda g=group: tier.put_many(g, soon)]  # type: ignore[misc]
        took = [timed(call) for call in pair[:: 1 if n % 2 else -1]][:: 1 if n % 2 else -1]
        several.append((took[0], took[1]))
        at += together * shard
    into = segments.aligned(shard)
    for i, record in enumerate(records):
        calls = [
            ("plain read", lambda i=i: os.preadv(fd, [into.data], i * shard)),
            ("get", lambda r=record: tier.get(r, [into], soon)),
        ]
        for name, call in calls[:: 1 if i % 2 else -1]:
            times[name].append(timed(call))
        times["get + digest"].append(times["get"][-1] + timed(lambda: kernels.digest(into)))
    dd.append(_dd(folder, rounds, shard))
    os.close(fd)
    tier.close()
    rows = []
    rate = {n: shard * len(t) / sum(t) / 1e3 for n, t in times.items()}
    for name, base in (("put", "plain write"), ("get", "plain read"), ("get + digest", "plain read")):
        if name != "get + digest":
            rows.append(row(f"{base} {shard >> 10} KiB", times[base], **{"GB/s": rate[base]}))
        rows.append(row(f"{name} {shard >> 10} KiB", times[name], **{"GB/s": rate[name]}))
        rows[-1]["of plain"] = rate[name] / rate[base]
        # A disk that is shared with others has moments; the median pair does not.
        pairs = [b / t for b, t in zip(times[base], times[name], strict=True)]
        rows[-1]["of plain, median pair"] = statistics.median(pairs)
    sums = [sum(times) for times in zip(*several, strict=True)]
    rows.insert(
        2,
        {
            "row": f"put of {together} waiting chunks {shard >> 10} KiB",
            "GB/s": shard * together * len(several) / sums[1] / 1e3,
            "of plain": sums[0] / sums[1],
            "of plain, median pair": statistics.median(a / b for a, b in several),
        },
    )
    for at, what in enumerate(("write", "read")):
        mean = statistics.mean(d[at] for d in dd)
        rows.append(
            {"row": f"dd {what} {shard >> 10} KiB", "GB/s": mean, "put/get of dd": rate["get" if at else "put"] / mean}
        )
    return rows


def _dd(folder: Path, rounds: int, shard: int) -> tuple[float, float]:
    """GB/s that dd writes and reads in blocks of that size, past the page cache."""
    size, count, file = f"bs={shard}", f"count={rounds}", folder / "dd"
    rates = []
    for words in (
        ["if=/dev/zero", f"of={file}", "oflag=direct"],
        [f"if={file}", "of=/dev/null", "iflag=direct"],
    ):
        said = subprocess.run(["dd", size, count, *words], capture_output=True, text=True, check=True).stderr
        found = re.search(r"(\d+) bytes .*, ([0-9.e-]+) s,", said)
        assert found is not None, said
        rates.append(int(found[1]) / float(found[2]) / 1e9)
    file.unlink()
    return rates[0], rates[1]


def through_the_daemon(folder: Path, rounds: int, chunks: int, shard: int) -> list[dict[str, Any]]:
    """What engines get of the disk: chunks stored as fast as it goes until all are on the disk, then, after a restart,
    brought up again with their digests verified, beside dd in the same run. The medians of a few rounds."""
    words = ("--disk", str(folder / f"kv-{shard}"), "--disk-size", "8GiB", "--disk-min-free", "0")
    payload = segments.aligned(shard)
    payload[:] = np.random.default_rng(1).integers(0, 256, shard, dtype=np.uint8)
    digest, room = kernels.digest(payload), 9 * chunks * shard  # an eighth of it may wait for the disk
    down, up, dd = [], [], []
    for n in range(rounds):
        names = keys((n + 1) * 10**6, chunks)
        with daemon(folder, room, *words) as (cache, client):
            assert client.arena is not None
            began = time.perf_counter()
            for name in names:
                grant = client.reserve("w", [wire.ReserveItem(name, b"", 0, 1, shard, 256)], 30)[0]
                client.arena.bytes[grant.offset : grant.offset + shard] = payload
                client.commit([wire.CommitItem(grant.reservation, digest)], 30)
            while cache.status()["tiers"]["disk"]["chunks"] < (n + 1) * chunks:
                time.sleep(0.005)
            down.append(time.perf_counter() - began)
        with daemon(folder, room, *words) as (_, client):
            began = time.perf_counter()
            while True:
                reply = client.lookup(names, 30)
                if reply.lease:
                    client.release(reply.lease, 30)
                if not reply.loading:
                    break
                time.sleep(0.002)
            up.append(time.perf_counter() - began)
            assert len(reply.found) == chunks
        dd.append(_dd(folder, chunks, shard))
    size = chunks * shard / 1e9
    write, read = (statistics.median(d[i] for d in dd) for i in (0, 1))
    return [
        {"row": f"{what} {shard >> 10} KiB", "GB/s": size / took, "dd": base, "of dd": size / took / base}
        for what, took, base in (
            ("stored to disk", statistics.median(down), write),
            ("brought up", statistics.median(up), read),
        )
    ]


def start(folder: Path, gigabytes: int, shard: int) -> list[dict[str, Any]]:
    """Seconds until a tier of so many bytes knows what it has."""
    folder.mkdir()
    count, segment_bytes = gigabytes * 10**9 // shard, 1 << 30
    number, made = 0, 0
    while made < count:
        number += 1
        fd = os.open(folder / f"{number:08d}.seg", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, segments.first_page(segments.SegmentName(segments.DISK_FORMAT, number, time.time())), 0)
        at = PAGE
        while made < count and at + shard < segment_bytes:
            head = segments.header(number, at, ChunkRecord(FORMAT_VERSION, keys(made, 1)[0], b"", 256, shard, [5]))
            os.pwrite(fd, head, at)
            at += len(head) + shard
            made += 1
        os.ftruncate(fd, at)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    rows = []
    for how in ("headers alone", "index file"):
        began = time.perf_counter()
        tier = DiskTier(folder, 2 * gigabytes * 10**9, min_free=0)
        took = time.perf_counter() - began
        assert tier.stats()["chunks"] == count
        tier.close()
        size = (folder / "index").stat().st_size
        rows.append({"row": f"start from {how}", "seconds": took, "chunks": count, "index KiB": size / 1024})
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    for r in rows:
        cells = "".join(f"  {k} {v:.2f}" if v < 100 else f"  {k} {v:.0f}" for k, v in r.items() if k != "row")
        print(f"  {r['row']:48}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--folder", help="on the disk to measure; default: the temporary folder's")
    parser.add_argument("--index-gb", type=int, default=100, metavar="N", help="gigabytes of segments to start with")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rounds = 50 if args.quick else 500
    folder = Path(tempfile.mkdtemp(prefix="bt-", dir=args.folder))
    try:
        tables = {
            "operations": operations(folder, rounds),
            "store pressure": pressure(folder, rounds),
            "disk, 1 MiB": disk(folder / "a", rounds // 2, 1 << 20),
            "disk, 6 MiB": disk(folder / "b", rounds // 4, 6 << 20),
            "disk through the daemon, 1 MiB": through_the_daemon(folder, 5, 200, 1 << 20),
            "disk through the daemon, 6 MiB": through_the_daemon(folder, 5, 40, 6 << 20),
            f"start with {args.index_gb} GB, chunks of 1 MiB": start(folder / "d", args.index_gb, 1 << 20),
            f"start with {args.index_gb} GB, chunks of 6 MiB": start(folder / "e", args.index_gb, 6 << 20),
        }
    finally:
        shutil.rmtree(folder)
    for title, rows in tables.items():
        show(title, rows)
    if args.json:
        facts = {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}
        Path(args.json).write_text(json.dumps({**facts, "tables": tables}, indent=1))


if __name__ == "__main__":
    main()

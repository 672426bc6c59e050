"""The cache daemon and its disk tier, each figure beside its baseline from the same run.

    python tests/bench/bench_tiers.py [--quick] [--folder DIR] [--json FILE]

lookup, reserve+commit of 400 chunks (a prompt of 100k tokens) beside a bare ping over the same socket; lookups while
others keep a full arena under store pressure, beside the same lookups when idle; the disk tier's put and get beside plain
O_DIRECT writes and reads of the same sizes, taken in turns. Times in microseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pdserve import kernels
from pdserve.chunk import FORMAT_VERSION
from pdserve.errors import CacheUnavailable
from pdserve.transfer import wire
from pdserve.transfer.client import CacheClient
from pdserve.transfer.tiers import segments
from pdserve.transfer.tiers.base import ChunkRecord
from pdserve.transfer.tiers.disk import DiskTier

CHUNKS = 400
SHARD = 65536


def keys(start: int, count: int) -> list[bytes]:
    return [(start + i).to_bytes(32, "little") for i in range(count)]


class Daemon:
    """One of its own, gone when the block is left."""

    def __init__(self, folder: Path, size: int, *words: str) -> None:
        self.socket = folder / "c.sock"
        name = f"bench-{os.getpid()}"
        argv = [
            "cache",
            "serve",
            "--socket",
            str(self.socket),
            "--size",
            str(size),
            "--name",
            name,
            "--admin-port",
            "18093",
        ]
        env = {**os.environ, "PDSERVE_LOG_LEVEL": "error"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pdserve", *argv, "--scrub-rate", "0", *words], env=env
        )

    def __enter__(self) -> CacheClient:
        client = CacheClient(self.socket, "bench")
        for _ in range(600):
            try:
                client.ping(5)
                return client
            except CacheUnavailable:
                time.sleep(0.1)
        raise SystemExit("the daemon did not come up")

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        self.process.wait(20)


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
    with Daemon(folder, 1 << 30) as client:
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
        client.close()
    ping = statistics.median(found["ping"])
    return [row(name, times, ratio=statistics.median(times) / ping) for name, times in found.items()]


def pressure(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """A full arena with a disk tier below; one client looks 40 chunks up, another stores without pause or does nothing."""
    words = ("--disk", str(folder / "kv"), "--disk-size", "512MiB", "--disk-min-free", "0")
    with Daemon(folder, 256 << 20, *words) as client:
        hot = keys(1, 40)
        payload = np.full(SHARD, 7, np.uint8)
        store(client, hot, payload)
        other = CacheClient(folder / "c.sock", "writer")
        go, stop, n = threading.Event(), threading.Event(), [1]

        def write() -> None:
            while not stop.is_set():
                if not go.wait(0.1):
                    continue
                n[0] += 1
                store(other, keys(n[0] * 10**6, 8), payload)
                time.sleep(0.002)  # 8 x 64 KiB every few ms: a few hundred MB/s

        writer = threading.Thread(target=write)
        writer.start()
        for n_fill in range(700):  # full before anything is measured
            store(client, keys((10**6 + n_fill) * 10**6, 8), payload)
            lookup(client, hot)  # in use, and so the last to go
            release(client)
        found: dict[str, list[float]] = {"idle": [], "under store pressure": []}
        try:
            for block in range(2 * max(4, rounds // 50)):
                name = list(found)[block % 2]
                (go.set if block % 2 else go.clear)()
                time.sleep(0.1)
                for _ in range(50):
                    found[name].append(timed(lambda: lookup(client, hot)))
                    release(client)
                    time.sleep(0.001)
        finally:
            stop.set()
            writer.join(10)
        client.close()
        other.close()
    rows = [row(f"lookup 40, {name}", times) for name, times in found.items()]
    rows[1]["p99 ratio"] = rows[1]["p99"] / rows[0]["p99"]
    return rows


def disk(folder: Path, rounds: int, shard: int) -> list[dict[str, Any]]:
    """put and get of one chunk in turns with a plain write and read of as many bytes, each growing its own file."""
    folder.mkdir()
    tier = DiskTier(folder / "disk", 4 << 30, min_free=0)
    data = segments.aligned(shard)
    data[:] = np.random.default_rng(1).integers(0, 256, shard, dtype=np.uint8)
    digest = kernels.digest(data)
    fd, _ = segments.open_file(str(folder / "plain"), os.O_RDWR | os.O_CREAT)
    soon = time.monotonic() + 600
    times: dict[str, list[float]] = {"plain write": [], "put": [], "plain read": [], "get": [], "get + digest": []}
    records = [ChunkRecord(FORMAT_VERSION, k, b"", 256, shard, [digest]) for k in keys(1, rounds)]
    for i, record in enumerate(records):
        times["plain write"].append(timed(lambda i=i: os.pwritev(fd, [data.data], i * shard)))  # type: ignore[misc]
        times["put"].append(timed(lambda r=record: tier.put(r, [data], soon)))  # type: ignore[misc]
    into = segments.aligned(shard)
    for i, record in enumerate(records):
        times["plain read"].append(timed(lambda i=i: os.preadv(fd, [into.data], i * shard)))  # type: ignore[misc]
        times["get"].append(timed(lambda r=record: tier.get(r, [into], soon)))  # type: ignore[misc]
        times["get + digest"].append(times["get"][-1] + timed(lambda: kernels.digest(into)))
    os.close(fd)
    tier.close()
    rows = []
    for name, base in (
        ("plain write", ""),
        ("put", "plain write"),
        ("plain read", ""),
        ("get", "plain read"),
        ("get + digest", "plain read"),
    ):
        rate = {n: shard * len(t) / sum(t) / 1e3 for n, t in times.items()}
        rows.append(row(f"{name} {shard >> 10} KiB", times[name], **{"GB/s": rate[name]}))
        if base:
            rows[-1]["of plain"] = rate[name] / rate[base]
            # A disk that is shared with others has moments; the median pair does not.
            rows[-1]["of plain, median"] = statistics.median(times[base]) / statistics.median(times[name])
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    for r in rows:
        cells = "".join(f"  {k} {v:.2f}" if v < 100 else f"  {k} {v:.0f}" for k, v in r.items() if k != "row")
        print(f"  {r['row']:28}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--folder", help="on the disk to measure; default: the temporary folder's")
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

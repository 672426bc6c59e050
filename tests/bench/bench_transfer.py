#!/usr/bin/env python
"""What the cache costs beside the plainest way to do the same: copies against memcpy, requests against a bare ping.

    .venv/bin/python -P tests/bench/bench_transfer.py [--json FILE] [--rounds N]

All rows of a table come from one run, alternating with their baseline; figures are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from running_cache import RunningCache

from pdserve import kernels
from pdserve.transfer import arena, wire
from pdserve.transfer.arena import Arena
from pdserve.transfer.client import CacheClient
from pdserve.transfer.staging_host import HostPages

# The demo model on CPU vLLM: 30 layers, blocks of 128 tokens with 3 KV heads of 64, K and V, bf16.
LAYERS, BLOCK_BYTES, BLOCKS = 30, 98304, 2
PR_SET_THP_DISABLE = 41
SHARD = LAYERS * BLOCK_BYTES * BLOCKS


def clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(rounds: int, **calls: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each call, run in turn so that all see the same machine, in another order each round, since what a
    call finds in the cache is what the one before it left."""
    order = random.Random(1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            times[name].append(clock(calls[name]))
    return {name: statistics.median(t) for name, t in times.items()}


@contextlib.contextmanager
def only_small_pages() -> Iterator[None]:
    """What is started meanwhile gets no huge pages, however it asks."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_THP_DISABLE")
    try:
        yield
    finally:
        libc.prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)


def copies(arena: Arena, small: Arena, rounds: int) -> list[dict[str, Any]]:
    """Twelve chunks of 256 tokens between scattered engine blocks and the arena, and the same bytes by np.copyto; beside it, an
    arena that was made when there were only small pages."""
    chunks = 12
    pool = np.random.default_rng(0).integers(0, 256, LAYERS * chunks * BLOCKS * BLOCK_BYTES, dtype=np.uint8)
    per_layer = chunks * BLOCKS * BLOCK_BYTES
    bases = [pool.ctypes.data + i * per_layer for i in range(LAYERS)]
    pages = HostPages([bases], [BLOCK_BYTES] * LAYERS, BLOCK_BYTES, chunks * BLOCKS)
    order = np.random.default_rng(1).permutation(chunks * BLOCKS).tolist()
    slots, smalls = ([a.bytes[i * SHARD : (i + 1) * SHARD] for i in range(chunks)] for a in (arena, small))
    plain = [pool[i * SHARD : (i + 1) * SHARD] for i in range(chunks)]

    def each(call: Callable[[int], object]) -> Callable[[], None]:
        def run() -> None:
            for i in range(chunks):
                call(i)

        return run

    seconds = interleaved(
        rounds,
        memcpy_in=each(lambda i: np.copyto(slots[i], plain[i])),
        store=each(lambda i: pages.store(None, order[i * BLOCKS : (i + 1) * BLOCKS], 256, slots[i], SHARD)),
        store_small=each(lambda i: pages.store(None, order[i * BLOCKS : (i + 1) * BLOCKS], 256, smalls[i], SHARD)),
        memcpy_out=each(lambda i: np.copyto(plain[i], slots[i])),
        load=each(lambda i: pages.load(None, slots[i], order[i * BLOCKS : (i + 1) * BLOCKS], 256, SHARD)),
        load_small=each(lambda i: pages.load(None, smalls[i], order[i * BLOCKS : (i + 1) * BLOCKS], 256, SHARD)),
        digest=each(lambda i: kernels.digest(slots[i])),
    )
    speed = {name: chunks * SHARD / s / 1e9 for name, s in seconds.items()}
    return [
        row("store: gather + digest + copy", "GB/s", speed["store"], "memcpy", speed["memcpy_in"]),
        row("load: copy + digest + scatter", "GB/s", speed["load"], "memcpy", speed["memcpy_out"]),
        row("digest alone", "GB/s", speed["digest"], "memcpy", speed["memcpy_in"]),
        row("store", "GB/s", speed["store"], "in small pages", speed["store_small"]),
        row("load", "GB/s", speed["load"], "in small pages", speed["load_small"]),
    ]


def making(path: Path, rounds: int) -> list[dict[str, Any]]:
    """1 GiB of arena: made, as a daemon does, and mapped, as each engine does. A virtual machine whose host gives it the memory only
    now takes seconds for either kind."""
    seconds: dict[str, list[float]] = {}

    def once(kind: str) -> None:
        with only_small_pages() if kind == "small" else contextlib.nullcontext():
            began = time.perf_counter()
            made = arena.create(path, 1 << 30)
            seconds.setdefault(f"made {kind}", []).append(time.perf_counter() - began)
            seconds.setdefault(f"mapped {kind}", []).append(clock(lambda: arena.attach(path, 1 << 30).close()))
        made.close()
        path.unlink()

    order = random.Random(1)
    for _ in range(rounds):
        for kind in order.sample(["huge", "small"], 2):
            once(kind)
    middle = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    return [
        row(f"1 GiB of arena {what}", "ms", middle[f"{what} huge"], "in small pages", middle[f"{what} small"])
        for what in ("made", "mapped")
    ]


#: as engines ask: what a step of so many tokens has computed is reserved at once, and committed a few chunks at a time
STEP, COMMITTED, PROMPT = 8, 4, 24


def processor(cache: RunningCache, client: CacheClient, gigabytes: float) -> list[dict[str, Any]]:
    """Prompts are stored and loaded back until the bytes are many: each chunk with its own calls, in the calls of an engine
    that prefills in steps, and all chunks of a prompt in one call. What the daemon's process used meanwhile. New chunks
    evict old ones."""
    assert client.arena is not None
    data = np.random.default_rng(2).integers(0, 256, SHARD, dtype=np.uint8)
    out = np.empty_like(data)
    digest = kernels.digest(data)
    fresh, rows = 1 << 50, []
    ways = {
        "1 chunk a call": (1, 1, 1),
        f"steps of {STEP} chunks": (PROMPT, STEP, COMMITTED),
        "12 chunks a call": (12, 12, 12),
    }
    for name, (prompt, step, committed) in ways.items():
        moved, before, began = 0, cache.cpu_seconds(), time.monotonic()
        while moved < gigabytes * 1e9:
            keys = [(fresh + i).to_bytes(32, "big") for i in range(prompt)]
            fresh += prompt
            items = [wire.ReserveItem(k, keys[i - 1] if i else b"", 0, 1, SHARD, 256) for i, k in enumerate(keys)]
            for at in range(0, prompt, step):
                grants = client.reserve("bench", items[at : at + step], 5)
                for first in range(0, step, committed):
                    some = grants[first : first + committed]
                    for grant in some:
                        np.copyto(client.arena.bytes[grant.offset : grant.offset + SHARD], data)
                    client.commit([wire.CommitItem(g.reservation, digest) for g in some], 5)
            reply = client.lookup(keys, 5)
            for found in reply.found:
                np.copyto(out, client.arena.bytes[found.offset : found.offset + SHARD])
            client.release(reply.lease, 5, len(reply.found), SHARD * len(reply.found))
            moved += SHARD * (prompt + len(reply.found))
        used, took = cache.cpu_seconds() - before, time.monotonic() - began
        per_gb = 1e3 / (moved / 1e9)
        rows.append(row(f"daemon's CPU, {name}", "ms/GB", used * per_gb, "ms/GB taken by all", took * per_gb))
    return rows


def row(what: str, unit: str, value: float, baseline_is: str, baseline: float) -> dict[str, Any]:
    return {"what": what, "unit": unit, "value": value, "baseline_is": baseline_is, "baseline": baseline}


def requests(client: CacheClient, rounds: int, count: int = 400) -> list[dict[str, Any]]:
    """A prompt of 100k tokens: 400 chunks in one round trip, beside an empty one."""
    keys = [i.to_bytes(32, "big") for i in range(1, count + 1)]
    items = [wire.ReserveItem(k, keys[i - 1] if i else b"", 0, 1, 4096, 256) for i, k in enumerate(keys)]
    grants = client.reserve("bench", items, 5)
    client.commit([wire.CommitItem(g.reservation, 1) for g in grants], 5)

    def lookup() -> None:
        reply = client.lookup(keys, 5)
        assert len(reply.found) == count
        leases.append(reply.lease)

    def store() -> None:
        nonlocal fresh
        some = [wire.ReserveItem((fresh + i).to_bytes(32, "big"), b"", 0, 1, 4096, 256) for i in range(count)]
        fresh += count
        got = client.reserve("bench", some, 5)
        client.commit([wire.CommitItem(g.reservation, 1) for g in got], 5)

    leases: list[int] = []
    fresh = 1 << 40
    times: dict[str, list[float]] = {"ping": [], "lookup": [], "store": []}
    for _ in range(max(100, rounds * 10)):
        times["ping"].append(clock(lambda: client.ping(5)))
        times["lookup"].append(clock(lookup))
        client.release(leases.pop(), 5)
        times["store"].append(clock(store))

    def at(name: str, share: float) -> float:
        return sorted(times[name])[int(share * (len(times[name]) - 1))] * 1000

    labels = {"lookup": f"lookup of {count} chunks", "store": f"reserve + commit of {count} chunks"}
    shares = {"p50": 0.5, "p99": 0.99}
    return [
        row(f"{label}, {p}", "ms", at(name, share), f"ping {p}", at("ping", share))
        for name, label in labels.items()
        for p, share in shares.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        daemon = RunningCache(Path(folder), f"bench-{os.getpid()}", 512 << 20, "--scrub-rate", "0")
        client = CacheClient(daemon.socket, "bench")
        path = arena.path_for(f"bench-{os.getpid()}-small")
        try:
            client.connect(30)
            assert client.arena is not None
            with only_small_pages():
                small = arena.create(path, 128 << 20)
            path.unlink()
            huge = f"{daemon.status()['huge_bytes'] >> 20} of 512 MiB of the arena in huge pages, {small.huge_bytes() >> 20} of the other"
            rows = copies(client.arena, small, args.rounds) + requests(client, args.rounds)
            rows += processor(daemon, client, 0.8 * args.rounds) + making(path, min(8, args.rounds))
        finally:
            path.unlink(missing_ok=True)
            client.close()
            daemon.stop()
    print(
        f"kernels: {kernels.path()[0]}; {platform.machine()}, Python {platform.python_version()}; medians of {args.rounds} rounds; {huge}"
    )
    for r in rows:
        ratio = r["value"] / r["baseline"]
        print(
            f"{r['what']:36} {r['value']:9.2f} {r['unit']:5} {r['baseline_is']:>18} {r['baseline']:9.2f}   x {ratio:.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps({"command": " ".join(sys.argv), "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

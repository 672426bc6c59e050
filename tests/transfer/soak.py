"""A million operations against one daemon with a disk tier: memory and file descriptors stay flat.

python tests/transfer/soak.py [--operations 1000000]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from running_cache import RunningCache

from pdserve import kernels
from pdserve.transfer import wire
from pdserve.transfer.client import CacheClient

SHARD, PER_CALL = 8192, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--operations", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        words = ("--disk", f"{folder}/kv", "--disk-size", "128MiB", "--disk-min-free", "0")
        cache = RunningCache(Path(folder), f"soak-{os.getpid()}", 64 << 20, *words)
        client = CacheClient(cache.socket, "soak")
        try:
            run(client, cache, args.operations)
        finally:
            client.close()
            cache.stop()


def run(client: CacheClient, cache: RunningCache, operations: int) -> None:
    client.connect(60)
    payload = np.full(SHARD, 3, np.uint8)
    digest = kernels.digest(payload)
    done, start, began, told = 0, (0, 0), time.monotonic(), 0
    while done < operations:
        first = int(np.random.default_rng(done).integers(60_000)) * 16
        keys = [(first + i).to_bytes(32, "little") for i in range(PER_CALL)]
        reply = client.lookup(keys, 30)
        if reply.lease:
            client.release(reply.lease, 30, len(reply.found), 0)
        items = [wire.ReserveItem(k, keys[i - 1] if i else b"", 0, 1, SHARD, 256) for i, k in enumerate(keys)]
        granted = [g for g in client.reserve("w", items, 30) if g.status == wire.GRANTED]
        assert client.arena is not None
        for grant in granted:
            client.arena.bytes[grant.offset : grant.offset + SHARD] = payload
        client.commit([wire.CommitItem(g.reservation, digest) for g in granted], 30)
        done += 1 + 1 + 2 * PER_CALL
        if not any(start) and done > operations // 4:  # everything is full, every path was taken
            start = cache.weight()
        if done >= told:
            told += operations // 20
            kib, descriptors = cache.weight()
            print(
                f"{done:>9} operations, {time.monotonic() - began:5.0f} s: {kib} KiB, {descriptors} descriptors",
                flush=True,
            )
    end = cache.weight()
    print(f"{done} operations in {time.monotonic() - began:.0f} s; KiB, descriptors: {start} -> {end}")
    assert end[0] < start[0] + 24 * 1024, "memory grows"
    assert end[1] <= start[1] + 4, "descriptors grow"


if __name__ == "__main__":
    main()

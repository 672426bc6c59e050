"""Each remote tier beside its own client: the same values put and got through the tier and with the client's bare calls.

    python tests/bench/bench_remote.py [--mib 1 8] [--only redis s3 mooncake fs] [--json FILE]

Starts the servers itself, on this machine, and ends them: redis-server, localbucket (S3), mooncake_master with a process that
lends memory. A server that is not installed is left out and named. Tier and client take turns in one run; figures are
medians. The tier's side carries what the client's does not: deadlines, copies that a caller can walk away from, the record.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "transfer" / "tiers"))

import tier_servers

from pdserve.transfer.tiers import registry
from pdserve.transfer.tiers.base import Tier
from pdserve.transfer.tiers.conformance import make_chunk

PATIENCE_S = 60.0
Raw = tuple[Callable[[str, memoryview], object], Callable[[str], object]]


@contextmanager
def redis() -> Iterator[tuple[Tier, Raw]]:
    import redis as library

    server = tier_servers.Redis()
    client = library.Redis(port=server.port, password=server.password, protocol=2)
    try:
        yield registry.bare(server.url + "?timeout=10"), (client.set, client.get)
    finally:
        client.close()
        server.kill()


@contextmanager
def s3() -> Iterator[tuple[Tier, Raw]]:
    import boto3

    os.environ["AWS_ACCESS_KEY_ID"] = os.environ["AWS_SECRET_ACCESS_KEY"] = "bench"
    server = tier_servers.LocalBucket()
    client = boto3.client("s3", endpoint_url=server.endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="bench")
    try:
        yield (
            registry.bare(f"s3://bench/kv?endpoint={server.endpoint}&timeout=10"),
            (
                lambda name, data: client.put_object(Bucket="bench", Key=name, Body=bytes(data)),
                lambda name: client.get_object(Bucket="bench", Key=name)["Body"].read(),
            ),
        )
    finally:
        client.close()
        server.kill()


@contextmanager
def mooncake() -> Iterator[tuple[Tier, Raw]]:
    server = tier_servers.Mooncake(1 << 30)
    tier = registry.bare(server.url + "?timeout=20")
    tier.contains([bytes(32)])
    library = __import__("mooncake.store").store
    store = library.MooncakeDistributedStore()
    assert store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", f"127.0.0.1:{server.port}") == 0
    buffer = np.empty(64 << 20, np.uint8)
    assert store.register_buffer(buffer.ctypes.data, buffer.nbytes) == 0
    sizes: dict[str, int] = {}

    def put(name: str, data: memoryview) -> None:
        # The client's own way: the value lies in registered memory already.
        sizes[name] = data.nbytes
        assert store.put_from(name, buffer.ctypes.data, data.nbytes) == 0

    def get(name: str) -> None:
        assert store.get_into(name, buffer.ctypes.data, sizes[name]) == sizes[name]

    try:
        yield tier, (put, get)
    finally:
        tier.close()
        store.close()
        server.kill()


@contextmanager
def fs() -> Iterator[tuple[Tier, Raw]]:
    folder = Path(tempfile.mkdtemp(prefix="pdserve-bench-"))
    (folder / "tier").mkdir()

    def put(name: str, data: memoryview) -> None:
        with (folder / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    try:
        yield registry.bare(f"file://{folder}/tier?min_free=0&timeout=10"), (put, lambda n: (folder / n).read_bytes())
    finally:
        shutil.rmtree(folder)


KINDS = {"redis": redis, "s3": s3, "mooncake": mooncake, "fs": fs}


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(name: str, tier: Tier, raw: Raw, mib: int, rounds: int) -> list[dict[str, Any]]:
    put, get = raw
    times: dict[str, list[float]] = {"tier put": [], "raw put": [], "tier get": [], "raw get": []}
    for i in range(rounds + 1):
        record, payload = make_chunk(mib << 20)
        into = [np.ones(mib << 20, np.uint8)]
        value = memoryview(payload[0])
        took = {
            "tier put": timed(lambda: _true(tier.put(record, payload, time.monotonic() + PATIENCE_S))),  # noqa: B023
            "raw put": timed(lambda: put(f"raw{mib}-{i}", value)),  # noqa: B023
            "tier get": timed(lambda: _true(tier.get(record, into, time.monotonic() + PATIENCE_S))),  # noqa: B023
            "raw get": timed(lambda: get(f"raw{mib}-{i}")),  # noqa: B023
        }
        assert np.array_equal(into[0], payload[0])
        if i:  # the first opens connections
            for what, seconds in took.items():
                times[what].append(seconds)
    rows = []
    for what in ("put", "get"):
        ours, theirs = statistics.median(times[f"tier {what}"]), statistics.median(times[f"raw {what}"])
        rate = (mib << 20) / 1e9
        rows.append(
            {
                "tier": name,
                "what": what,
                "mib": mib,
                "gb_s": rate / ours,
                "raw_gb_s": rate / theirs,
                "ratio": theirs / ours,
            }
        )
    return rows


def lookups(name: str, tier: Tier, rounds: int) -> dict[str, Any]:
    """Microseconds per key of asking for 100 that are not there."""
    keys = [os.urandom(32) for _ in range(100)]
    took = [timed(lambda: tier.contains(keys)) for _ in range(rounds)]
    return {
        "tier": name,
        "what": "contains",
        "keys": len(keys),
        "us_per_key": statistics.median(took) / len(keys) * 1e6,
    }


def _true(answer: bool) -> None:
    assert answer is True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", nargs="+", type=int, default=[1, 8], help="sizes of the values (default 1 8)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'':26}{'tier GB/s':>12}{'client GB/s':>13}{'tier/client':>13}")
    for name in args.only:
        try:
            with KINDS[name]() as (tier, raw), contextlib.closing(tier):
                for mib in args.mib:
                    for row in measure(name, tier, raw, mib, args.rounds):
                        rows.append(row)
                        title = f"{name} {row['what']} {mib} MiB"
                        print(
                            f"{title:26}{row['gb_s']:>12.2f}{row['raw_gb_s']:>13.2f}{row['ratio']:>13.2f}", flush=True
                        )
                rows.append(lookups(name, tier, args.rounds))
                print(f"{name} contains, 100 keys at once: {rows[-1]['us_per_key']:.0f} us a key", flush=True)
        except (tier_servers.Missing, ImportError) as e:
            print(f"{name}: left out: {e}")
    if args.json:
        Path(args.json).write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

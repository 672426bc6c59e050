"""A disk that takes seconds for a write, made by the kernel: what clients of the cache notice of it, and whether it recovers.

    python tests/transfer/slow_disk.py [--folder DIR] [--kib-per-second 256] [--seconds 60]

The daemon is put into a control group of its own whose direct reads and writes of the folder's device are held to that
rate (cgroup v1's blkio controller, as root). It must answer every call, take what it can, drop the rest, say so, and come
back when the disk does; no byte that it gives may be wrong, and `cache check` finds nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from running_cache import RunningCache

from pdserve import kernels
from pdserve.transfer import wire
from pdserve.transfer.client import CacheClient

BLKIO = Path("/sys/fs/cgroup/blkio")
CHUNK = 1 << 20
#: a call that takes longer has failed
CALL_S = 5.0
RECOVER_S = 300.0


class Brake:
    """Holds the processes in it to a rate on one device."""

    def __init__(self, folder: Path) -> None:
        device = os.stat(folder).st_dev
        self._device = f"{os.major(device)}:{os.minor(device)}"
        self.group = BLKIO / f"pdserve-slow-{os.getpid()}"

    def add(self, pid: int) -> None:
        self.group.mkdir(exist_ok=True)
        (self.group / "cgroup.procs").write_text(str(pid))

    def hold(self, rate: int) -> None:
        """Bytes per second; 0: as fast as it goes."""
        for way in ("read", "write"):
            (self.group / f"blkio.throttle.{way}_bps_device").write_text(f"{self._device} {rate}")

    def close(self) -> None:
        if self.group.exists():
            self.group.rmdir()


def content(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, CHUNK, dtype=np.uint8)


def key(i: int) -> bytes:
    return i.to_bytes(32, "little")


class Client:
    """An engine that looks for a chunk and stores the next, and keeps the time of each call."""

    def __init__(self, cache: RunningCache) -> None:
        self.client = CacheClient(cache.socket, "slow")
        self.client.connect(30)
        self.next = 0
        self.times: dict[str, list[float]] = {"lookup": [], "reserve": [], "commit": []}

    def timed(self, what: str, call: Callable[[], object]) -> object:
        began = time.perf_counter()
        answer = call()
        self.times[what].append(time.perf_counter() - began)
        return answer

    def store(self) -> bool:
        self.next += 1
        item = wire.ReserveItem(key(self.next), b"", 0, 1, CHUNK, 256)
        (grant,) = self.timed("reserve", lambda: self.client.reserve("w", [item], CALL_S))  # type: ignore[misc]
        if grant.status != wire.GRANTED:
            return False
        data = content(self.next)
        assert self.client.arena is not None
        self.client.arena.bytes[grant.offset : grant.offset + CHUNK] = data
        item = wire.CommitItem(grant.reservation, kernels.digest(data))
        self.timed("commit", lambda: self.client.commit([item], CALL_S))
        return True

    def look(self, i: int) -> str:
        """found (every byte compared), loading, or absent."""
        reply = self.timed("lookup", lambda: self.client.lookup([key(i)], CALL_S))
        assert isinstance(reply, wire.LookupReply)
        for f in reply.found:
            assert self.client.arena is not None
            same = np.array_equal(self.client.arena.bytes[f.offset : f.offset + CHUNK], content(i))
            assert same, f"chunk {i}: wrong bytes"
            self.client.release(reply.lease, CALL_S, 1, CHUNK)
        return "found" if reply.found else "loading" if reply.loading else "absent"

    def work(self, seconds: float) -> dict[str, int]:
        """Stores, and looks for what has just been stored and for what is on disk alone, if anywhere."""
        self.times = {name: [] for name in self.times}
        counts = dict.fromkeys(("stored", "no room", "found", "loading", "absent"), 0)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            counts["stored" if self.store() else "no room"] += 1
            for i in (self.next, max(1, self.next - 200)):
                counts[self.look(i)] += 1
            time.sleep(0.01)
        return counts

    def show(self, title: str, counts: dict[str, int]) -> None:
        print(f"{title}: {', '.join(f'{n} {what}' for what, n in counts.items())}")
        for name, times in self.times.items():
            ms = [t * 1e3 for t in times]
            p99 = statistics.quantiles(ms, n=100)[98]
            print(f"  {name:8} p50 {statistics.median(ms):7.2f}  p99 {p99:7.2f}  longest {max(ms):7.2f} ms", flush=True)


@contextlib.contextmanager
def running(folder: Path, brake: Brake) -> Iterator[tuple[RunningCache, Client]]:
    words = ("--disk", str(folder / "kv"), "--disk-size", "1GiB", "--disk-min-free", "0", "--scrub-rate", "0")
    cache = RunningCache(folder, f"slow-{os.getpid()}", 64 << 20, *words)
    try:
        brake.add(cache.process.pid)
        client = Client(cache)
        yield cache, client
        client.client.close()
    finally:
        brake.hold(0)
        cache.stop()


def dropped(cache: RunningCache) -> float:
    lines = cache.get("/metrics").splitlines()
    return sum(float(x.split()[1]) for x in lines if x.startswith("pdserve_cache_tier_dropped_writes_total{"))


def recovers(cache: RunningCache, client: Client) -> None:
    """What is stored now goes to the disk, and comes back from it."""
    ends = time.monotonic() + RECOVER_S
    while cache.status()["tiers"]["disk"]["queued_down"]:
        assert time.monotonic() < ends, "what waits for the disk does not get less"
        time.sleep(0.1)
    assert client.store()
    wanted = client.next
    for _ in range(100):  # it goes from memory
        client.store()
    while (outcome := client.look(wanted)) != "found":
        assert outcome == "loading" or time.monotonic() < ends, "it is not found again"
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", help="on the disk that is to be slow; default: the temporary folder's")
    parser.add_argument("--kib-per-second", type=int, default=256)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="with the slow disk; a third of it with the fast one"
    )
    args = parser.parse_args()
    if os.geteuid() or not (BLKIO / "blkio.throttle.write_bps_device").exists():
        sys.exit("this needs root and cgroup v1's blkio controller with throttling, mounted at /sys/fs/cgroup/blkio")
    with tempfile.TemporaryDirectory(prefix="slow-disk-", dir=args.folder) as name:
        folder, brake = Path(name), Brake(Path(name))
        try:
            with running(folder, brake) as (cache, client):
                client.show("fast disk", client.work(args.seconds / 3))
                assert cache.status()["tiers"]["disk"]["chunks"]
                brake.hold(args.kib_per_second << 10)
                before = dropped(cache)
                counts = client.work(args.seconds)
                client.show(f"{args.kib_per_second} KiB/s", counts)
                disk = cache.status()["tiers"]["disk"]
                print(f"  {dropped(cache) - before:.0f} writes dropped; {disk}")
                assert counts["stored"], "nothing could be stored"
                assert dropped(cache) > before, "the disk was not slow"
                brake.hold(0)
                began = time.monotonic()
                recovers(cache, client)
                print(f"fast again: stored and brought up after {time.monotonic() - began:.1f} s")
            check = [sys.executable, "-P", "-m", "pdserve", "cache", "check", str(folder / "kv")]
            print(subprocess.run(check, check=True, capture_output=True, text=True).stdout.strip())
        finally:
            brake.close()


if __name__ == "__main__":
    main()

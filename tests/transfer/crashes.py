"""Kills a cache daemon at chosen points of random work, starts it again on what is left, and looks at every byte.

    python tests/transfer/crashes.py --schedules 100 [--seed N] [--minutes M]

Each schedule is a few lives of one daemon: store, index, journal, tiers and disk as in production, without the sockets.
A life ends by SIGKILL inside the daemon at a labelled point (transfer/faults.py), or gracefully. The parent, which only
forks, keeps the account of what the daemon has acknowledged. What must hold in each life that follows:
  * nothing found has a wrong byte;
  * what was acknowledged and neither deleted nor evicted is found again; what was deleted is not;
  * all space is either free or a visible chunk's, in memory and under the cap on disk.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

from pdserve import kernels
from pdserve.transfer import arena, faults, journal, wire
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.daemon import Daemon
from pdserve.transfer.lower import WRITE_POLICIES, Rules
from pdserve.transfer.tiers.disk import DiskTier

KEYS = 60
SHARD = PAGE + 24
PATIENCE_S = 90.0


def key(i: int) -> bytes:
    return i.to_bytes(32, "little")


def content(i: int, shard: int) -> np.ndarray:
    return np.random.default_rng(i * 2 + shard).integers(0, 256, SHARD, dtype=np.uint8)


CONTENT = {(i, s): content(i, s) for i in range(KEYS) for s in range(2)}
DIGESTS = {which: kernels.digest(data) for which, data in CONTENT.items()}


class Life:
    """One daemon in this process. `tell` notes what it has acknowledged, where the parent can read it."""

    def __init__(self, name: str, folder: Path, plan: Plan, seed: int, label: str, nth: int, tell: int) -> None:
        self.rng = random.Random(seed)
        self.label, self.left, self.tell_fd = label, nth, tell
        disk = DiskTier(folder, plan.disk_pages * PAGE, min_free=0, segment_bytes=32 * PAGE, fault=self.fault)
        self.daemon = Daemon(
            name=name,
            size=plan.arena_pages * PAGE,
            chunk_tokens=256,
            tiers=[(disk, Rules(write=plan.write))],
            fault=self.fault,
        )
        self.disk = disk
        self.calls = 0

    def fault(self, label: str) -> None:
        if label == self.label:
            self.left -= 1
            if self.left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def tell(self, what: str, i: int) -> None:
        os.write(self.tell_fd, f"{what} {i}\n".encode())

    def ask(self, make):
        self.calls += 1
        return self.daemon.answer(make(self.calls), 1)

    async def turn(self, seconds: float = 0.0) -> None:
        await asyncio.sleep(seconds)
        self.daemon.tiering.tick(time.monotonic())

    async def settle(self) -> None:
        ends = time.monotonic() + PATIENCE_S
        while True:
            lowers = self.daemon.tiering.lowers
            if not self.daemon.tiering.recovering and not any(x.up or x.down or x.deleting for x in lowers):
                return
            assert time.monotonic() < ends, "the tiers do not come to rest"
            await self.turn(0.001)

    # ---- work ----

    def store(self, i: int) -> bool:
        parent = key(i - 1) if i % 6 else b""
        items = [wire.ReserveItem(key(i), parent, s, 2, SHARD, 256, bytes([i % 3])) for s in range(2)]
        grants = self.ask(lambda n: wire.Reserve(n, "w", items)).grants
        commits = []
        for s, grant in enumerate(grants):
            if grant.status != wire.GRANTED:
                return False
            self.daemon.arena.bytes[grant.offset : grant.offset + SHARD] = CONTENT[i, s]
            commits.append(wire.CommitItem(grant.reservation, DIGESTS[i, s]))
        self.ask(lambda n: wire.Commit(n, commits))
        return True

    async def load(self, first: int, count: int) -> list[int]:
        """Which of the run were found, after looking at every byte."""
        ends = time.monotonic() + PATIENCE_S
        keys = [key(i) for i in range(first, first + count)]
        while True:
            reply = self.ask(lambda n: wire.Lookup(n, keys))
            if not reply.loading:
                break
            if lease := reply.lease:
                self.ask(lambda n, lease=lease: wire.Release(n, lease))
            assert time.monotonic() < ends, "loading has no end"
            await self.turn(0.001)
        for i, found in zip(range(first, first + count), reply.found, strict=False):
            for s in range(2):
                at = found.offset + s * found.stride
                assert found.digests[s] == DIGESTS[i, s], f"chunk {i}: wrong digest"
                assert np.array_equal(self.daemon.arena.bytes[at : at + SHARD], CONTENT[i, s]), (
                    f"chunk {i}: wrong bytes"
                )
        if reply.lease:
            self.ask(lambda n: wire.Release(n, reply.lease, len(reply.found), 0))
        return list(range(first, first + len(reply.found)))

    async def work(self, steps: int) -> None:
        for _ in range(steps):
            i = self.rng.randrange(KEYS)
            match self.rng.choices(("chain", "load", "drop", "clear", "turn", "index"), (40, 40, 6, 0.5, 10, 2))[0]:
                case "chain":
                    for j in range(i - i % 6, i + 1):
                        self.tell("storing", j)  # a kill between its commit and the next line leaves it stored
                        if self.store(j):
                            self.tell("stored", j)
                case "load":
                    await self.load(i - i % 6, 6)
                case "drop":
                    self.tell("dropping", i)
                    self.daemon.drop([key(i)])
                    if self.rng.random() < 0.5:  # others ask while the disk still has it
                        await self.load(i - i % 6, 6)
                    await self.settle()
                    self.tell("dropped", i)
                case "clear":
                    self.tell("clearing", 0)
                    self.daemon.clear()
                    await self.settle()
                    self.tell("cleared", 0)
                case "turn":
                    await self.turn(0.002)
                case "index":
                    with self.disk._writing:
                        self.disk.save_index()
            await asyncio.sleep(0)

    # ---- looking ----

    async def check(self, account: Account, plan: Plan) -> None:
        await self.settle()
        found = set()
        for i in range(KEYS):
            found |= set(await self.load(i, 1))
        await self.settle()
        gone = found & account.dropped
        assert not gone, f"deleted and found again: {sorted(gone)}"
        if plan.roomy:
            lost = account.stored - found
            assert not lost, f"acknowledged and lost: {sorted(lost)}"
        chunks = list(self.daemon.store.chunks())
        stats = self.daemon.store.stats()
        assert stats["used_bytes"] == sum(c.size for c in chunks), "space in memory is leaked"
        assert stats["leases"] == stats["reservations"] == 0
        used = 0
        for file in self.disk.path.iterdir():
            with contextlib.suppress(FileNotFoundError):  # an index that has just taken the other one's place
                used += file.stat().st_size
        assert used <= plan.disk_pages * PAGE, f"{used} bytes on disk, the cap is {plan.disk_pages * PAGE}"
        self.tell("looked", 0)


class Account:
    """What the daemon has acknowledged, as far as it is certain."""

    def __init__(self) -> None:
        self.stored: set[int] = set()
        self.dropped: set[int] = set()
        self.looked = False

    def read(self, text: str) -> None:
        for line in text.splitlines():
            what, _, number = line.partition(" ")
            i = int(number)
            if what == "storing":
                self.dropped.discard(i)
            elif what == "stored":
                self.stored.add(i)
            elif what == "dropping":
                self.stored.discard(i)
            elif what == "dropped":
                self.dropped.add(i)
            elif what == "clearing":
                self.stored.clear()
            elif what == "cleared":
                self.dropped = set(range(KEYS))
            elif what == "looked":
                self.looked = True


class Plan:
    """How a schedule's daemon is built; the same for all its lives."""

    def __init__(self, rng: random.Random) -> None:
        self.roomy = rng.random() < 0.4  # then nothing is evicted, and nothing may be lost
        self.arena_pages = 1024 if self.roomy else 60
        self.disk_pages = 4096 if self.roomy or rng.random() < 0.3 else 320
        self.write = rng.choice(WRITE_POLICIES[:1] * 3 + WRITE_POLICIES[1:])


def live(name: str, folder: Path, plan: Plan, seed: int, label: str, nth: int, account: Account) -> int:
    """One life in a child; returns how it ended: 0, or -9."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.close(reader)
            asyncio.run(_life(name, folder, plan, seed, label, nth, account, writer))
            code = 0
        except BaseException:  # noqa: BLE001 - whatever it was, the parent hears of it by the exit code
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    account.read(text)
    return os.waitstatus_to_exitcode(status)


async def _life(name, folder, plan, seed, label, nth, account, writer) -> None:  # type: ignore[no-untyped-def]
    life = Life(name, folder, plan, seed, label, nth, writer)
    life.daemon.loop = asyncio.get_running_loop()
    life.daemon.recover()
    if life.rng.random() < 0.5:
        await life.check(account, plan)  # else: work begins while the chunks of before are still being verified
    await life.work(life.rng.randrange(10, 70))
    if not label:
        await life.settle()
        await life.check(Account(), plan)
    life.daemon.journal.flush()
    if label:
        os.kill(os.getpid(), signal.SIGKILL)  # the point was not reached: here, then
    life.daemon.close()


def schedule(seed: int, label: str) -> None:
    """Raises AssertionError with the seed when anything is not as it must be."""
    rng = random.Random(seed)
    name = f"crash-{os.getpid()}-{seed}"
    folder = Path(tempfile.mkdtemp(prefix="pdserve-crash-"))
    plan, account = Plan(rng), Account()
    try:
        for _ in range(rng.randrange(1, 4)):
            ended = live(name, folder, plan, rng.randrange(2**32), label, rng.randrange(1, 25), account)
            assert ended == -signal.SIGKILL, f"seed {seed}, {label}: the daemon ended with {ended}"
        ended = live(name, folder, plan, rng.randrange(2**32), "", 0, account)
        assert ended == 0, f"seed {seed}, {label}: after the crashes it ended with {ended}"
    finally:
        shutil.rmtree(folder)
        arena.path_for(name).unlink(missing_ok=True)
        journal.path_for(arena.path_for(name)).unlink(missing_ok=True)
        journal.path_for(arena.path_for(name)).with_suffix(".journal.new").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schedules", type=int, default=100)
    parser.add_argument("--seed", type=int, default=None, help="of the first schedule; default: by chance, and printed")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most this long")
    args = parser.parse_args()
    kernels.path()  # loaded before the forks
    first = args.seed if args.seed is not None else random.randrange(2**31)
    labels = [*faults.LABELS, "nowhere"]
    began, done, told = time.monotonic(), 0, time.monotonic()
    for done in range(args.schedules):
        schedule(first + done, labels[(first + done) % len(labels)])
        if time.monotonic() - told > 60:
            told = time.monotonic()
            print(f"{done + 1} schedules from seed {first} after {told - began:.0f} s", flush=True)
        if time.monotonic() - began > args.minutes * 60:
            break
    print(f"{done + 1} schedules from seed {first} in {time.monotonic() - began:.0f} s: all as it must be")


if __name__ == "__main__":
    main()

"""A disk that is full, read-only, broken or as slow as can be: serving from memory goes on, and status and metrics say so."""

import asyncio
import errno
import os
import threading
from argparse import Namespace

import numpy as np
import pytest
from prometheus_client import generate_latest

from pdserve import kernels
from pdserve.transfer import wire
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.daemon import Daemon
from pdserve.transfer.lower import Rules
from pdserve.transfer.serving import _tiers
from pdserve.transfer.tiers.disk import DiskTier

COUNT = 100
DATA = np.random.default_rng(5).integers(0, 256, (COUNT, PAGE), dtype=np.uint8)


def key(i):
    return i.to_bytes(32, "little")


@pytest.fixture
def daemon(tmp_path):
    tiers = [(DiskTier(tmp_path, 4 << 20, min_free=0, segment_bytes=1 << 18), Rules())]
    made = Daemon(name=f"test-{os.getpid()}-sick", size=1 << 20, chunk_tokens=256, tiers=tiers)
    yield made
    made.close()


def serve(daemon):
    """What engines do: every chunk is stored, found and right, whatever the disk does."""
    for i in range(COUNT):
        (grant,) = daemon.answer(wire.Reserve(1, "w", [wire.ReserveItem(key(i), b"", 0, 1, PAGE, 256)]), 1).grants
        assert grant.status == wire.GRANTED
        daemon.arena.bytes[grant.offset : grant.offset + PAGE] = DATA[i]
        assert (
            daemon.answer(wire.Commit(2, [wire.CommitItem(grant.reservation, kernels.digest(DATA[i]))]), 1).count == 1
        )
    reply = daemon.answer(wire.Lookup(3, [key(i) for i in range(COUNT)]), 1)
    assert len(reply.found) == COUNT
    for i, found in enumerate(reply.found):
        assert (daemon.arena.bytes[found.offset : found.offset + PAGE] == DATA[i]).all()
    assert daemon.answer(wire.Release(4, reply.lease, COUNT, COUNT * PAGE), 1).count == 1


def shown(daemon):
    """(the tier in GET /status, the lines of GET /metrics)"""
    daemon.refresh_gauges()
    lines = generate_latest(daemon.registry).decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return daemon.status()["tiers"]["disk"], {
        name.removeprefix("pdserve_cache_"): float(v) for name, v in values.items()
    }


async def at_rest(daemon):
    for _ in range(4000):
        if not daemon.tiering.lowers[0].down:
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the queue does not empty")


@pytest.mark.parametrize(
    ("number", "state"),
    [(errno.ENOSPC, "full"), (errno.EROFS, "read-only"), (errno.EIO, "failing: Input/output error")],
)
def test_writes_that_fail_hurt_nobody_and_are_shown(daemon, monkeypatch, number, state):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    async def run():
        daemon.loop = asyncio.get_running_loop()
        monkeypatch.setattr(os, "pwritev", fail)
        serve(daemon)
        await at_rest(daemon)
        status, metrics = shown(daemon)
        assert (status["state"], status["chunks"]) == (state, 0)
        assert metrics['tier_up{tier="disk"}'] == 0
        assert metrics['tier_failures_total{op="put",reason="error",tier="disk"}'] >= 1
        assert metrics['tier_failures_total{op="put",reason="refused",tier="disk"}'] >= 1  # then it is left alone
        monkeypatch.undo()
        daemon.tiering.lowers[0].tier._retry_at = 0.0  # as if a few seconds had passed
        daemon.tiering.lowers[0].rules = Rules("selective")
        daemon.tiering.writing.used([daemon.store.peek(key(0))])  # offered again, with its next use
        await at_rest(daemon)
        status, metrics = shown(daemon)
        assert (status["state"], metrics['tier_up{tier="disk"}'], status["chunks"]) == ("ok", 1, 1)

    asyncio.run(run())


def test_a_disk_that_takes_for_ever_hurts_nobody_and_is_shown(daemon, monkeypatch):
    goes_on, real = threading.Event(), os.pwritev

    def slow(*words):
        goes_on.wait(60)
        return real(*words)

    async def run():
        daemon.loop = asyncio.get_running_loop()
        monkeypatch.setattr(os, "pwritev", slow)
        serve(daemon)
        status, metrics = shown(daemon)
        bound = (1 << 20) // 8 // PAGE
        assert status["queued_down"] == metrics['tier_queue{direction="down",tier="disk"}'] == bound
        assert metrics['tier_dropped_writes_total{tier="disk"}'] == COUNT - bound
        goes_on.set()
        await at_rest(daemon)
        status, metrics = shown(daemon)
        assert (status["queued_down"], status["chunks"], status["state"]) == (0, bound, "ok")

    try:
        asyncio.run(run())
    finally:
        goes_on.set()


def test_a_disk_that_cannot_be_opened_hurts_nobody_and_is_shown(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    tiers = _tiers(Namespace(disk=str(tmp_path / "file" / "kv"), disk_size=64 << 20))
    daemon = Daemon(name=f"test-{os.getpid()}-shut", size=1 << 20, chunk_tokens=256, tiers=tiers)
    try:
        serve(daemon)
        status, metrics = shown(daemon)
        assert "not in use" in status["state"]
        assert "Not a directory" in status["state"]
        assert metrics['tier_up{tier="disk"}'] == 0
        assert metrics['tier_dropped_writes_total{tier="disk"}'] == COUNT
        assert (status["queued_down"], status["chunks"]) == (0, 0)
        assert daemon.clear()[0] == COUNT
    finally:
        daemon.close()

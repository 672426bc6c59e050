"""The workers' half with a real daemon, real shared memory and plain arrays for the engine's blocks."""

import os
import signal
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from pdserve.errors import CacheError
from pdserve.transfer import wire
from pdserve.transfer.client import CacheClient
from pdserve.transfer.staging_host import HostPages

pytest.importorskip("vllm", reason="the connector's messages derive from vLLM's classes")
from worker_engines import BLOCK_BYTES, BLOCKS, LAYERS, Engine, Held, expecting, job, key

from pdserve.engines.vllm import worker_side
from pdserve.engines.vllm.messages import ChunkLoad, ChunkSave, LoadJob, SaveJob, StepPlan

pytestmark = pytest.mark.usefixtures("patient")


def test_blocks_saved_by_one_engine_are_loaded_by_another_bit_for_bit(cache_daemon, engines):
    a, b = engines(), engines(writer="v")
    a.save("r", (key(1), b"", [3, 1]), (key(2), key(1), [7]))
    assert a.wait(a.side.report).saved == {"r": 1}
    client = CacheClient(cache_daemon.socket, "scheduler")
    load, lease = job(client, "q", [key(1), key(2)], [[0, 5], [9]])
    before = b.kv.copy()
    b.side.start_loads(StepPlan(loads=[load]))
    _, received, blocks = b.wait(lambda: (got := b.side.finished())[1] and got)
    assert (received, blocks) == ({"q"}, set())
    assert (b.kv[:, [0, 5, 9]] == a.kv[:, [3, 1, 7]]).all()
    others = [i for i in range(BLOCKS) if i not in (0, 5, 9)]
    assert (b.kv[:, others] == before[:, others]).all()
    assert b.side.report().loaded["q"].nbytes == 3 * LAYERS * BLOCK_BYTES
    client.release(lease, 60)
    client.close()


class Steps:
    """What a worker tells the one that touches its GPU."""

    def __init__(self):
        self.worth, self.uses = [], 0

    def step(self, worth):
        self.worth.append(worth)

    def used(self):
        self.uses += 1

    def close(self):
        """Its end is test_quick's."""


def test_the_gpu_is_touched_when_nothing_is_on_its_way(cache_daemon, engines):
    quick = Steps()
    a, b = engines(), engines(writer="v", kind=Held, quick=quick)
    b.side.start_loads(StepPlan(answers=1))
    b.side.start_loads(StepPlan())
    assert quick.worth == [True, False]
    a.save("r", (key(1), b"", [3]))
    a.wait(a.side.report)
    client = CacheClient(cache_daemon.socket, "scheduler")
    load, lease = job(client, "q", [key(1)], [[0]])
    b.side.start_loads(StepPlan(answers=1, loads=[load]))
    b.side.start_loads(StepPlan(answers=1))
    assert quick.worth[-1] is False, "a load is under way"
    assert not quick.uses
    b.pages.may_end.set()
    b.wait(lambda: b.side.finished()[1])
    assert quick.uses == 1
    b.side.start_loads(StepPlan(answers=1))
    assert quick.worth[-1] is True
    client.release(lease, 60)
    client.close()


def test_blocks_that_the_engine_has_are_left_alone(cache_daemon, engines):
    a, b = engines(), engines(writer="v")
    a.save("r", (key(1), b"", [3, 1]))
    a.wait(a.side.report)
    client = CacheClient(cache_daemon.socket, "scheduler")
    load, _ = job(client, "q", [key(1)], [[None, 5]])
    before = b.kv.copy()
    b.side.start_loads(StepPlan(loads=[load]))
    b.wait(lambda: b.side.finished()[1])
    assert (b.kv[:, 5] == a.kv[:, 1]).all()
    assert (np.delete(b.kv, 5, axis=1) == np.delete(before, 5, axis=1)).all()
    client.close()


def test_ranks_fill_one_chunk_together_and_each_reads_its_own_part(cache_daemon, engines):
    ranks = [engines(rank=r, shards=2) for r in (0, 1)]
    for e in ranks:
        e.save("r", (key(1), b"", [2]))
    for e in ranks:
        e.wait(e.side.report)
    readers = [engines(rank=r, shards=2, writer="v") for r in (0, 1)]
    client = CacheClient(cache_daemon.socket, "scheduler")
    load, _ = job(client, "q", [key(1)], [[4]])
    for e in readers:
        e.side.start_loads(StepPlan(loads=[load]))
        assert e.wait(lambda e=e: e.side.finished()[1]) == {"q"}
    for a, b in zip(ranks, readers, strict=True):
        assert (b.kv[:, 4] == a.kv[:, 2]).all()
    client.close()


@pytest.mark.parametrize("flips", range(3))
def test_a_flipped_bit_in_the_arena_is_a_failed_load_that_names_the_chunk(cache_daemon, engines, flips):
    a, b = engines(), engines(writer="v")
    a.save("r", (key(1), b"", [3]), (key(2), key(1), [4]))
    a.wait(a.side.report)
    client = CacheClient(cache_daemon.socket, "scheduler")
    load, _ = job(client, "q", [key(1), key(2)], [[0], [1]])
    at = load.chunks[1].offset + int(np.random.default_rng().integers(LAYERS * BLOCK_BYTES))
    client.arena.bytes[at] ^= 1 << flips
    b.side.start_loads(StepPlan(loads=[load]))
    _, received, blocks = b.wait(lambda: (got := b.side.finished())[1] and got)
    assert (received, blocks) == ({"q"}, {1})  # what came before it stays good
    result = b.side.report().loaded["q"]
    assert result.corrupt == [key(2)]
    assert "digest mismatch" in result.error
    client.close()


def test_a_restarted_daemon_between_lookup_and_load_is_a_failed_load(engines):
    b = engines()
    chunk = ChunkLoad(key(1), 0, 256, LAYERS * BLOCK_BYTES * 2, LAYERS * BLOCK_BYTES * 2, [7], [None, 5])
    b.side.start_loads(StepPlan(loads=[LoadJob("q", "another daemon", [chunk])]))
    _, received, blocks = b.wait(lambda: (got := b.side.finished())[1] and got)
    assert (received, blocks) == ({"q"}, {5})
    assert "restarted" in b.side.report().loaded["q"].error


def test_saves_without_a_daemon_end_quickly_and_report(tmp_path):
    e = Engine(tmp_path / "none.sock")
    e.save("r", (key(1), b"", [3]))
    assert e.wait(e.side.report).saved == {"r": 1}
    e.side.close()


def test_awaited_requests_are_reported_once_their_saves_are_done(engines):
    e = engines()
    e.save("r", (key(1), b"", [3]))
    e.side.start_loads(StepPlan(awaiting={"r"}))
    assert e.wait(lambda: e.side.finished()[0]) == {"r"}
    assert e.side.finished()[0] == set()
    e.side.start_loads(StepPlan(awaiting={"gone"}))
    assert e.side.finished()[0] == {"gone"}  # nothing outstanding: at once


@contextmanager
def halted(daemon):
    os.kill(daemon.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)


def until_saved(e, count):
    """So many saves of request r were reported, done or dropped."""
    while count > 0:
        count -= e.wait(e.side.report).saved["r"]


def test_saves_of_a_preempted_request_that_have_not_begun_never_read_its_blocks(cache_daemon, engines):
    e = engines()
    with halted(cache_daemon):  # the first save hangs in its reservation, the second one in the queue
        e.save("r", (key(1), b"", [3]))
        e.save("r", (key(2), key(1), [4]))
        time.sleep(0.1)
        e.side.before_overwrite(StepPlan(preempted={"r"}))
        e.kv[:] = 0  # overwritten
    until_saved(e, 2)
    client = CacheClient(cache_daemon.socket, "scheduler")
    assert client.lookup([key(1)], 60).found == []
    assert client.lookup([key(2)], 60).found == []
    e.wait(lambda: cache_daemon.status()["reservations"] == 0)
    client.close()


def test_what_a_request_computes_after_its_preemption_is_stored_from_its_new_blocks(cache_daemon, engines):
    """One step may tell of both: what was to be stored before is dropped, what this step computes is not."""
    e = engines()
    with halted(cache_daemon):
        e.save("r", (key(1), b"", [3]))
        plan = StepPlan(saves=[SaveJob("r", [ChunkSave(key(2), b"", 256, [4])])], preempted={"r"})
        e.side.before_overwrite(plan)
        e.kv[:, 3] = 0
        e.side.start_loads(plan)
        e.side.start_saves(plan)
    until_saved(e, 2)
    client = CacheClient(cache_daemon.socket, "scheduler")
    assert client.lookup([key(1)], 60).found == []
    load, lease = job(client, "s", [key(2)], [[9]])
    e.side.start_loads(StepPlan(loads=[load]))
    assert e.wait(lambda: e.side.finished()[1]) == {"s"}
    assert (e.kv[:, 9] == e.kv[:, 4]).all()
    client.release(lease, 60)
    client.close()


class Reading(HostPages):
    """A store that reads its blocks until the test says so; what is asked of the device, in order."""

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.reads, self.may_end, self.asked = threading.Event(), threading.Event(), []

    def mark(self):
        self.asked.append("mark")

    def store(self, *args):
        self.asked.append("store")
        self.reads.set()
        assert self.may_end.wait(60)
        return super().store(*args)

    def settle(self):
        self.asked.append("settle")


def test_blocks_that_are_being_read_are_not_given_up_before_the_read_has_ended(cache_daemon, engines):
    e = engines(kind=Reading)
    pages = e.pages
    try:
        e.save("r", (key(1), b"", [3]), (key(2), key(1), [4]))
        assert pages.reads.wait(60)
        step = threading.Thread(target=e.side.before_overwrite, args=(StepPlan(preempted={"r"}),))
        step.start()
        step.join(0.05)
        assert step.is_alive()
    finally:
        pages.may_end.set()
    step.join(60)
    assert not step.is_alive()
    # The first chunk's copy has begun, so the device is waited for, too; the second one's never begins.
    assert pages.asked == ["mark", "store", "settle"]
    assert e.wait(e.side.report).saved == {"r": 1}


def test_closing_twice_or_calling_after_close_is_harmless(cache_daemon):
    e = Engine(cache_daemon.socket)
    e.side.close()
    with pytest.raises(CacheError):
        e.side._client.ping(1)
    e.side.close()


def test_a_step_that_computes_nothing_waits_for_the_load_and_not_beyond_its_end(cache_daemon, engines, monkeypatch):
    monkeypatch.setattr(worker_side, "IDLE_S", 30.0)
    a, b = engines(), engines(writer="v")
    a.save("r", (key(1), b"", [3]))
    a.wait(a.side.report)
    client = CacheClient(cache_daemon.socket, "scheduler")
    load, _ = job(client, "q", [key(1)], [[4]])
    b.side.start_loads(StepPlan(loads=[load], idle=True))
    assert b.side.finished()[1] == {"q"}  # at once, without being asked again
    b.side.start_loads(StepPlan(idle=True))
    assert b.side.finished()[1] == set()  # nothing is under way: no wait
    client.close()


def test_a_step_that_computes_never_waits_for_a_load(cache_daemon, engines, monkeypatch):
    monkeypatch.setattr(worker_side, "IDLE_S", 600.0)
    b = engines()
    client = CacheClient(cache_daemon.socket, "scheduler")
    client.connect()
    b.side.start_loads(StepPlan(loads=[expecting(client, "waits", [key(9)], [[6]], stall_s=600)]))
    assert b.side.finished()[1] == set()
    b.side.start_loads(StepPlan(dropped={"waits"}, idle=True))
    assert b.side.finished()[1] == {"waits"}
    client.close()


def test_one_rank_s_load_ends_whatever_the_other_rank_does(cache_daemon, engines):
    """A rank that lags (here: never starts) holds up no other one: each copies, reports and is done by itself."""
    ranks = [engines(rank=r, shards=2) for r in (0, 1)]
    for e in ranks:
        e.save("r", (key(1), b"", [2]))
    for e in ranks:
        e.wait(e.side.report)
    quick, lags = (engines(rank=r, shards=2, writer="v") for r in (0, 1))
    client = CacheClient(cache_daemon.socket, "scheduler")
    load, _ = job(client, "q", [key(1)], [[4]])
    quick.side.start_loads(StepPlan(loads=[load]))
    assert quick.wait(lambda: quick.side.finished()[1]) == {"q"}
    quick.save("s", (key(2), b"", [5]))
    quick.side.start_loads(StepPlan(awaiting={"s"}))
    assert quick.wait(lambda: quick.side.finished()[0]) == {"s"}  # its blocks go, though the chunk is not whole
    assert client.lookup([key(2)], 60).found == []
    assert lags.side.finished() == (set(), set(), set())
    client.close()


def test_a_full_arena_refuses_and_the_engine_goes_on(cache_daemon, engines, caplog):
    """Everything in the arena is leased, so nothing can be evicted."""
    client = CacheClient(cache_daemon.socket, "scheduler")
    client.connect()
    e = engines()
    size = client.arena.size // 3 // 4096 * 4096
    items = [wire.ReserveItem(key(100 + i), b"", 0, 1, size, 256) for i in range(3)]
    grants = client.reserve("other", items, 60)
    assert [g.status for g in grants] == [wire.GRANTED] * 3
    left = client.arena.size - 3 * size
    blocks = [b % BLOCKS for b in range(left // (LAYERS * BLOCK_BYTES) + 1)]  # a chunk that is larger than what is left
    with caplog.at_level("WARNING"):
        e.save("r", (key(1), b"", blocks))
        assert e.wait(e.side.report).saved == {"r": 1}
    client.abort([g.reservation for g in grants], 60)
    e.save("r", (key(1), b"", blocks))
    e.wait(e.side.report)
    reply = client.lookup([key(1)], 60)
    assert len(reply.found) == 1  # there is room now
    client.release(reply.lease, 60)
    client.close()

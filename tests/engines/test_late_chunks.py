"""Loads whose chunks are still being written, or on their way, with a real daemon and plain arrays for the engine's blocks."""

import threading
import time
import types
from dataclasses import replace

import pytest

from pdserve.transfer.client import CacheClient
from pdserve.transfer.staging_host import HostPages

pytest.importorskip("vllm", reason="the connector's messages derive from vLLM's classes")
from worker_engines import Held, HeldCopy, expecting, job, key

from pdserve.engines.vllm import loading
from pdserve.engines.vllm.messages import ChunkExpected, StepPlan

pytestmark = pytest.mark.usefixtures("patient")


def test_chunks_that_are_still_being_written_are_loaded_as_they_come(cache_daemon, engines):
    a, b = engines(), engines(writer="v")
    client = CacheClient(cache_daemon.socket, "scheduler")
    client.connect(30)
    keys, blocks = [key(1), key(2), key(3)], [[0, 5], [9], [2]]
    b.side.start_loads(StepPlan(loads=[expecting(client, "q", keys, blocks, stall_s=30)]))
    parent = b""
    for k, block in zip(keys, ([3, 1], [7], [11]), strict=True):
        time.sleep(0.05)
        assert b.side.finished()[1] == set()
        a.save("r", (k, parent, block))
        a.wait(a.side.report)
        parent = k
    _, received, unfilled = b.wait(lambda: (got := b.side.finished())[1] and got)
    assert (received, unfilled) == ({"q"}, set())
    assert (b.kv[:, [0, 5, 9, 2]] == a.kv[:, [3, 1, 7, 11]]).all()
    result = b.side.report().loaded["q"]
    assert (result.filled, result.late, result.error) == (3, ["dram"] * 3, "")
    b.wait(lambda: cache_daemon.status()["leases"] == 0)
    client.close()


def come_while_held(a, b, client):
    """Two chunks for b, the second one stored while the first is still on its way into b's blocks."""
    b.side.start_loads(StepPlan(loads=[expecting(client, "q", [key(1), key(2)], [[0, 5], [9]], stall_s=60)]))
    a.save("r", (key(1), b"", [3, 1]))
    a.wait(lambda: b.pages.under_way == 1)
    a.save("s", (key(2), key(1), [7]))
    a.wait(lambda: b.pages.under_way == 2)
    assert b.side.finished() == (set(), set(), set())  # nothing is reported while something may still write


def test_the_next_chunks_are_asked_for_while_the_last_are_on_their_way(cache_daemon, engines):
    a, b = engines(), engines(writer="v", kind=Held)
    client = CacheClient(cache_daemon.socket, "scheduler")
    client.connect(30)
    come_while_held(a, b, client)
    b.pages.may_end.set()
    _, received, unfilled = b.wait(lambda: (got := b.side.finished())[1] and got)
    assert (received, unfilled) == ({"q"}, set())
    assert (b.kv[:, [0, 5, 9]] == a.kv[:, [3, 1, 7]]).all()
    result = b.side.report().loaded["q"]
    assert (result.filled, result.late, result.error) == (2, ["dram"] * 2, "")
    client.close()
    b.wait(lambda: cache_daemon.status()["leases"] == 0)


def test_a_mismatch_with_more_chunks_on_their_way_fails_all_of_them_and_gives_every_lease_back(cache_daemon, engines):
    a, b = engines(), engines(writer="v", kind=Held)
    client = CacheClient(cache_daemon.socket, "scheduler")
    client.connect(30)
    load = HostPages.load
    seen = []

    def flipped(pages, mark, source, *args):
        if not seen:
            source[5] ^= 1
        seen.append(source)
        pages.under_way += 1
        return HeldCopy(load(pages, mark, source, *args), pages.may_end)

    b.pages.load = lambda *args: flipped(b.pages, *args)
    come_while_held(a, b, client)
    b.pages.may_end.set()
    _, received, unfilled = b.wait(lambda: (got := b.side.finished())[1] and got)
    assert (received, unfilled) == ({"q"}, {0, 5, 9})
    result = b.side.report().loaded["q"]
    assert (result.filled, result.late) == (0, [])
    assert "digest mismatch" in result.error
    client.close()
    b.wait(lambda: cache_daemon.status()["leases"] == 0)
    reader = CacheClient(cache_daemon.socket, "reader")
    assert not reader.lookup([key(1)], 60).found  # told, and never given to anybody again
    reader.close()


def test_a_load_given_up_is_not_over_while_its_chunks_are_on_their_way(cache_daemon, engines):
    a, b = engines(), engines(writer="v", kind=Held)
    client = CacheClient(cache_daemon.socket, "scheduler")
    client.connect(30)
    b.side.start_loads(StepPlan(loads=[expecting(client, "q", [key(1), key(2)], [[0, 5], [9]], stall_s=60)]))
    a.save("r", (key(1), b"", [3, 1]))
    a.wait(lambda: b.pages.under_way == 1)
    b.side.start_loads(StepPlan(dropped={"q"}))
    time.sleep(0.1)
    assert b.side.finished()[1] == set()
    b.pages.may_end.set()
    _, received, unfilled = b.wait(lambda: (got := b.side.finished())[1] and got)
    assert (received, unfilled) == ({"q"}, {9})
    client.close()
    b.wait(lambda: cache_daemon.status()["leases"] == 0)


def test_the_time_that_copying_takes_is_none_that_the_next_chunk_has_not_come(cache_daemon, engines, monkeypatch):
    a, b = engines(), engines(writer="v")
    a.save("r", (key(1), b"", [3]))
    a.wait(a.side.report)
    client = CacheClient(cache_daemon.socket, "scheduler")
    load, _ = job(client, "q", [key(1)], [[4]])
    load = replace(load, expected=[ChunkExpected(key(2), 256, [6])], stall_s=50)
    now, looked, lookup, copy = [0.0], threading.Event(), CacheClient.lookup, b.pages.load

    def slow(*args):
        now[0] += 100
        return copy(*args)

    def seen(self, keys, *args):
        reply = lookup(self, keys, *args)
        if keys == [key(2)] and not reply.found:
            looked.set()
        return reply

    b.pages.load = slow
    monkeypatch.setattr(CacheClient, "lookup", seen)
    clock = types.SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(loading, "time", clock)
    b.side.start_loads(StepPlan(loads=[load]))
    assert looked.wait(60)
    a.save("s", (key(2), key(1), [7]))
    _, received, unfilled = b.wait(lambda: (got := b.side.finished())[1] and got)
    assert (received, unfilled) == ({"q"}, set())
    assert (b.kv[:, [4, 6]] == a.kv[:, [3, 7]]).all()
    client.close()


def test_chunks_that_do_not_come_fail_by_their_blocks_and_what_came_stays_good(cache_daemon, engines):
    a, b = engines(), engines(writer="v")
    a.save("r", (key(1), b"", [3]))
    a.wait(a.side.report)
    client = CacheClient(cache_daemon.socket, "scheduler")
    client.connect(30)
    job = expecting(client, "q", [key(1), key(2)], [[4], [None, 6]], stall_s=0.1)
    b.side.start_loads(StepPlan(loads=[job]))
    _, received, unfilled = b.wait(lambda: (got := b.side.finished())[1] and got)
    assert (received, unfilled) == ({"q"}, {6})
    assert (b.kv[:, 4] == a.kv[:, 3]).all()
    result = b.side.report().loaded["q"]
    assert result.filled == 1
    assert "no chunk has come for 0.1 s, 1 are missing" in result.error
    client.close()


def test_a_load_that_waits_holds_up_no_other_and_ends_when_its_request_is_gone(cache_daemon, engines):
    a, b = engines(), engines(writer="v")
    a.save("r", (key(1), b"", [3]))
    a.wait(a.side.report)
    client = CacheClient(cache_daemon.socket, "scheduler")
    load, _ = job(client, "q", [key(1)], [[4]])
    b.side.start_loads(StepPlan(loads=[expecting(client, "waits", [key(9)], [[6]], stall_s=600), load]))
    assert b.wait(lambda: b.side.finished()[1]) == {"q"}
    b.side.start_loads(StepPlan(dropped={"waits"}))
    assert b.wait(lambda: b.side.finished()[1]) == {"waits"}
    client.close()


def test_closing_ends_a_load_that_waits(cache_daemon, engines):
    b = engines()
    client = CacheClient(cache_daemon.socket, "scheduler")
    client.connect(30)
    b.side.start_loads(StepPlan(loads=[expecting(client, "waits", [key(9)], [[6]], stall_s=600)]))
    b.side.close()
    assert b.side.finished()[1:] == ({"waits"}, {6})
    client.close()

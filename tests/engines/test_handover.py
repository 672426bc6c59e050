"""What one engine computes and another awaits: the scheduler's half, over the real index, without sockets or an engine."""

import time

import pytest
from scheduler_output import step

pytest.importorskip("vllm", reason="the connector's messages derive from vLLM's classes")
from scheduler_world import BLOCK, PROMISE, Status, commit, compute_all, output, request

from pdserve.engines.vllm import finding
from pdserve.engines.vllm.messages import LoadResult, SaveJob, WorkerReport

EARLY = {"do_remote_prefill": True, "pdserve.expect_s": 60}


def test_the_producers_answer_says_what_it_has_stored(world):
    r, _ = compute_all(world, "a", range(19), kv_transfer_params={"do_remote_decode": True})
    params = world.side.handover(r)
    assert (params["do_remote_prefill"], params["pdserve.num_tokens"], params["pdserve.source"]) == (
        True,
        19,
        "prefill-0",
    )
    r.status = Status("FINISHED_ABORTED")
    assert world.side.handover(r) is None


def test_the_consumer_waits_for_promised_chunks_and_then_loads_them(world):
    again = request("b", range(19), kv_transfer_params={"do_remote_prefill": True, "pdserve.num_tokens": 19})
    assert world.side.matched(again, 0) == (None, False)
    world.side._requests["b"].handover.polled_at = 0
    compute_all(world, "a", range(19))
    assert world.side.matched(again, 0) == (19, True)


def test_the_consumer_gives_up_on_chunks_that_do_not_come(world, monkeypatch):
    monkeypatch.setattr(finding, "HANDOVER_START_S", 0.05)
    again = request("b", range(19), kv_transfer_params={"do_remote_prefill": True, "pdserve.num_tokens": 19})
    ends = time.monotonic() + 60
    while (answer := world.side.matched(again, 0)) == (None, False):
        assert time.monotonic() < ends
    assert answer == (0, False)
    assert world.side.matched(again, 0) == (0, False)
    assert world.store.stats()["leases"] == 0


@pytest.mark.parametrize(
    "params",
    [
        {"do_remote_prefill": True},
        {"do_remote_prefill": True, "pdserve.num_tokens": "many"},
        {"do_remote_prefill": False, "pdserve.num_tokens": 9},
    ],
)
def test_strange_handover_params_are_no_reason_to_wait(world, params):
    assert world.side.matched(request("b", range(19), kv_transfer_params=params), 0) == (0, False)


def begin_compute(world, rid, tokens):
    """A producer that has committed its first chunk, and still computes the rest. Returns what is left to commit."""
    r = request(rid, tokens, kv_transfer_params={"do_remote_decode": True})
    world.side.matched(r, 0)
    world.side.allocated(r, list(range(-(-len(tokens) // BLOCK))), 0)
    (job,) = world.side.plan(step({rid: len(tokens)}, new=[(rid, 0)])).saves
    first, rest = job.chunks[:1], job.chunks[1:]
    commit(world.store, [SaveJob(rid, first)])
    return SaveJob(rid, rest)


@pytest.mark.parametrize("params", [PROMISE, EARLY])
def test_loading_begins_with_the_first_chunk_and_the_rest_is_expected(world, params):
    begin_compute(world, "a", range(19))
    r = request("b", range(19), kv_transfer_params=params)
    assert world.side.matched(r, 0) == (19, True)
    world.side.allocated(r, [30, 31, 32, 33, 34], 19)
    (job,) = world.side.plan(step({})).loads
    assert [(c.tokens, c.block_ids) for c in job.chunks] == [(8, [30, 31])]
    assert [(c.tokens, c.block_ids) for c in job.expected] == [(8, [32, 33]), (3, [34])]
    assert job.stall_s >= finding.HANDOVER_STALL_S
    world.side.reported(output(WorkerReport(loaded={"b": LoadResult(1, 10, 0.1, filled=3, late=["dram"] * 2)}), ["b"]))
    assert world.store.stats()["leases"] == 0


def test_an_early_decode_leg_waits_for_the_first_sign_without_a_lease(world):
    r = request("b", range(19), kv_transfer_params=EARLY)
    assert world.side.matched(r, 0) == (None, False)
    assert world.store.stats()["leases"] == 0
    begin_compute(world, "a", range(19))
    world.side._requests["b"].handover.polled_at = 0
    assert world.side.matched(r, 0) == (19, True)


def test_after_a_handover_that_broke_off_the_rest_is_computed_and_nothing_is_awaited(world):
    begin_compute(world, "a", range(19))
    r = request("b", range(19), kv_transfer_params=PROMISE)
    world.side.matched(r, 0)
    world.side.allocated(r, [30, 31, 32, 33, 34], 19)
    world.side.plan(step({}))
    world.side.reported(output(WorkerReport(loaded={"b": LoadResult(1, 10, 0.1, error="none came", filled=1)}), ["b"]))
    plan = world.side.plan(step({"b": 11}, new=[("b", 8)]))
    assert [c.tokens for j in plan.saves for c in j.chunks] == [8, 3]
    assert world.side.matched(r, 0) == (0, False)  # after a preemption, say


def test_a_request_that_ends_while_it_is_loaded_is_dropped_at_the_workers(world):
    begin_compute(world, "a", range(19))
    r = request("b", range(19), kv_transfer_params=EARLY)
    world.side.matched(r, 0)
    world.side.allocated(r, [30, 31, 32, 33, 34], 19)
    world.side.plan(step({}))
    world.side.finished(r)
    assert world.side.plan(step({})).dropped == {"b"}
    world.side.reported(output(WorkerReport(loaded={"b": LoadResult(error="gone")}), ["b"]))
    assert "b" not in world.side._requests


def test_a_prefill_for_another_host_asks_once_for_its_chunks_to_be_sent_there(world):
    params = {"do_remote_decode": True, "pdserve.push_to": "host-b"}
    r = request("a", range(19), kv_transfer_params=params)
    world.side.matched(r, 0)
    world.side.matched(r, 0)
    world.side.matched(request("b", range(19), kv_transfer_params={"pdserve.push_to": "host-b"}), 0)
    world.side.matched(request("c", range(19), kv_transfer_params={**params, "pdserve.push_to": 7}), 0)
    assert world.client.pushed == [("host-b", 3)]


def test_a_handover_across_a_reset_is_computed_without_a_wait(world):
    asked = {"do_remote_decode": True}
    before = world.side.handover(compute_all(world, "p", range(19), kv_transfer_params=asked)[0])
    world.side.reset()
    assert world.side.matched(request("q", range(19), kv_transfer_params=before), 0) == (0, False)
    after = world.side.handover(compute_all(world, "r", range(19), kv_transfer_params=asked)[0])
    assert world.side.matched(request("s", range(19), kv_transfer_params=after), 0) == (19, True)

"""The scheduler's half over the real index (store.py), without sockets or an engine."""

import types

import pytest
from scheduler_output import step

from pdserve.errors import UnsupportedError
from pdserve.transfer import wire

pytest.importorskip("vllm", reason="the connector's messages derive from vLLM's classes")
from scheduler_world import LAYOUT, PROMISE, commit, compute_all, output, request

from pdserve.engines.vllm import finding
from pdserve.engines.vllm.messages import LoadResult, StepPlan, WorkerReport
from pdserve.engines.vllm.scheduler_side import LONG_STEP, SchedulerSide


def test_full_chunks_and_the_tail_are_stored_from_their_own_blocks(world):
    _, plan = compute_all(world, "a", range(19))
    (job,) = plan.saves
    assert [(c.tokens, c.block_ids) for c in job.chunks] == [(8, [0, 1]), (8, [2, 3]), (3, [4])]
    assert [c.parent for c in job.chunks] == [b"", job.chunks[0].key, job.chunks[1].key]


def test_chunked_prefill_stores_each_chunk_in_the_step_that_completes_it(world):
    r = request("a", range(19))
    world.side.matched(r, 0)
    world.side.allocated(r, [10, 11, 12], 0)
    first = world.side.plan(step({"a": 10}, new=[("a", 0)]))
    assert [c.block_ids for j in first.saves for c in j.chunks] == [[10, 11]]
    second = world.side.plan(step({"a": 9}, cached=[("a", ([13, 14],), 10)]))
    assert [c.block_ids for j in second.saves for c in j.chunks] == [[12, 13], [14]]


def test_generated_tokens_are_stored_by_full_chunks_once_their_ids_are_known(world):
    r, _ = compute_all(world, "a", range(14))
    r.all_token_ids += [50, 51]
    r.num_tokens = 15  # one is sampled but its id is not known here yet, as under asynchronous scheduling
    assert not world.side.plan(step({"a": 1}, cached=[("a", None, 15)])).saves
    r.num_tokens = 16
    (job,) = world.side.plan(step({"a": 1}, cached=[("a", None, 16)])).saves
    assert [(c.tokens, c.block_ids) for c in job.chunks] == [(8, [2, 3])]


def test_the_same_prompt_is_a_full_hit_loaded_into_the_new_blocks(world):
    compute_all(world, "a", range(19))
    again = request("b", range(19))
    assert world.side.matched(again, 0) == (19, True)
    world.side.allocated(again, [30, 31, 32, 33, 34], 19)
    (job,) = world.side.plan(step({})).loads
    assert [c.block_ids for c in job.chunks] == [[30, 31], [32, 33], [34]]
    assert world.store.stats()["leases"] == 1
    world.side.reported(output(WorkerReport(loaded={"b": LoadResult(3, 100, 0.1)}), received=["b"]))
    assert world.store.stats()["leases"] == 0
    assert world.client.released[-1] == (3, [])
    assert not world.side.plan(step({"b": 1}, new=[("b", 18)])).saves  # nothing to store again


def test_what_the_engine_has_itself_is_not_loaded(world):
    compute_all(world, "a", range(19))
    again = request("b", range(19))
    assert world.side.matched(again, 12) == (7, True)  # its own cache ends inside the second chunk
    world.side.allocated(again, [0, 1, 2, 33, 34], 7)
    (job,) = world.side.plan(step({})).loads
    assert [c.block_ids for c in job.chunks] == [[None, 33], [34]]


def test_a_shared_prefix_hits_up_to_where_the_prompts_part(world):
    compute_all(world, "a", range(19))
    assert world.side.matched(request("b", [*range(17), 99, 99, 99]), 0) == (16, True)


@pytest.mark.parametrize(
    "change", [{"cache_salt": "x"}, {"lora_request": types.SimpleNamespace(lora_name="l", lora_path="/l")}]


)
def test_another_salt_or_lora_never_hits(world, change):
    compute_all(world, "a", range(19))
    assert world.side.matched(request("b", range(19), **change), 0) == (0, False)


def test_too_little_to_be_worth_it_is_neither_stored_nor_loaded(world):
    _, plan = compute_all(world, "a", range(17))
    assert [c.tokens for j in plan.saves for c in j.chunks] == [8, 8]
    assert world.side.matched(request("b", range(17)), 16) == (0, False)
    assert world.store.stats()["leases"] == 0


def test_a_request_that_never_gets_blocks_gives_its_lease_back(world):
    compute_all(world, "a", range(19))
    again = request("b", range(19))
    world.side.matched(again, 0)
    assert world.side.finished(again) is False
    assert world.store.stats()["leases"] == 0


def test_blocks_are_kept_until_every_worker_has_reported_its_saves(world):
    world.side._workers = 2
    r, _ = compute_all(world, "a", range(19))
    assert world.side.finished(r) is True
    assert world.side.plan(step({})).awaiting == {"a"}
    world.side.reported(output(WorkerReport(saved={"a": 1})))
    assert "a" in world.side._requests
    world.side.reported(output(WorkerReport(saved={"a": 1})))
    assert not world.side._requests


def test_with_nothing_outstanding_blocks_go_at_once(world):
    r, _ = compute_all(world, "a", range(19))
    world.side.reported(output(WorkerReport(saved={"a": 1})))
    assert world.side.finished(r) is False
    assert not world.side._requests


def test_a_failed_load_is_recomputed_reported_and_not_tried_again(world):
    compute_all(world, "a", range(19))
    again = request("b", range(19))
    world.side.matched(again, 0)
    world.side.allocated(again, [30, 31, 32, 33, 34], 19)
    (job,) = world.side.plan(step({})).loads
    bad = job.chunks[1].key
    world.side.reported(
        output(WorkerReport(loaded={"b": LoadResult(1, 10, 0.1, [bad], "digest mismatch")}), received=["b"])
    )
    assert world.client.released[-1] == (1, [bad])
    assert world.side.matched(again, 0) == (0, False)
    world.side.allocated(again, [30, 31, 32, 33, 34], 0)
    plan = world.side.plan(step({"b": 19}, new=[("b", 0)]))
    commit(world.store, plan.saves)
    assert world.side.matched(request("c", range(19)), 0) == (19, True)  # what was recomputed is there again


def test_after_a_preemption_the_new_blocks_count(world):
    r, _ = compute_all(world, "a", range(14))
    r.all_token_ids += [50, 51]
    r.num_tokens = 16
    plan = world.side.plan(step({"a": 16}, cached=[("a", ([70, 71, 72, 73],), 0)], preempted=["z"], resumed=["a"]))
    assert plan.preempted == {"z"}
    assert [c.block_ids for j in plan.saves for c in j.chunks] == [[72, 73]]


def test_resumed_as_new_in_the_step_that_tells_of_its_preemption_the_new_blocks_count(world):
    """vLLM's second model runner has no resumed requests, only new ones; after a forced reset all in one step."""
    r, _ = compute_all(world, "a", range(14))
    r.all_token_ids += [50, 51]
    r.num_tokens = 16
    world.side.matched(r, 8)
    world.side.allocated(r, [70, 71, 72, 73], 0)
    plan = world.side.plan(step({"a": 8}, new=[("a", 8)], preempted=["a"]))
    assert plan.preempted == {"a"}
    assert [c.block_ids for j in plan.saves for c in j.chunks] == [[72, 73]]
    assert world.side._requests["a"].cached_tokens == 0  # nothing was cached when it came


def test_a_token_whose_step_was_discarded_is_in_no_chunk(world):
    """A forced preemption with a step under way: its token never comes, so what is known ends before it."""
    r, _ = compute_all(world, "a", range(14))
    r.all_token_ids += [50]  # the sixteenth was sampled in the step that is discarded
    r.num_tokens = 15
    assert world.side.plan(step({"a": 1}, cached=[("a", None, 15)])).saves == []
    world.side.allocated(r, [70, 71, 72, 73], 0)
    assert world.side.plan(step({"a": 15}, new=[("a", 0)], preempted=["a"])).saves == []
    r.all_token_ids += [51]
    r.num_tokens = 16
    plan = world.side.plan(step({"a": 1}, cached=[("a", None, 15)]))
    assert [c.block_ids for j in plan.saves for c in j.chunks] == [[72, 73]]


def test_a_request_that_ends_in_a_load_is_not_kept_for_saves_from_before_its_preemption_too(world):
    """vLLM frees a request's blocks at the first of two reports, while the load still writes, and fails at the second."""
    r, _ = compute_all(world, "a", range(19))  # its saves are not reported yet
    world.side.plan(step({}, preempted=["a"]))
    assert world.side.matched(r, 0) == (19, True)
    world.side.allocated(r, [30, 31, 32, 33, 34], 19)
    assert len(world.side.plan(step({})).loads) == 1
    assert world.side.finished(r) is False  # vLLM keeps them for the load
    plan = world.side.plan(step({}))
    assert (plan.awaiting, plan.dropped) == (set(), {"a"})
    world.side.reported(output(WorkerReport(loaded={"a": LoadResult(3, 10, 0.1)}), received=["a"]))
    assert world.client.released == [(3, [])]
    assert "a" in world.side._requests
    world.side.reported(output(WorkerReport(saved={"a": 1})))
    assert world.side._requests == {}


def test_without_a_daemon_everything_is_a_miss_and_nothing_is_planned(world):
    world.client.connected = False
    r = request("a", range(19))
    assert world.side.matched(r, 0) == (0, False)
    world.side.allocated(r, [0, 1, 2, 3, 4], 0)
    assert world.side.plan(step({"a": 19}, new=[("a", 0)])) == StepPlan()
    assert world.side.finished(r) is False


def test_prompt_embeddings_are_left_alone(world):
    assert world.side.matched(request("a", [], prompt_token_ids=None), 0) == (0, False)


def test_a_chunk_size_that_does_not_fit_the_blocks_is_refused_with_the_fix(world):
    with pytest.raises(UnsupportedError, match=r"10 tokens are not whole engine blocks of 4 .*cache\.chunk_tokens"):
        world.side.check_chunk_tokens(10)


def test_what_was_offered_a_moment_ago_is_not_offered_again_unless_it_is_handed_over(world):
    compute_all(world, "a", range(19))

    def from_the_engines_own_cache(rid, **extra):
        r = request(rid, range(19), **extra)
        world.side.matched(r, 16)
        world.side.allocated(r, [0, 1, 2, 3, 4], 0)
        plan = world.side.plan(step({rid: 3}, new=[(rid, 16)]))
        return [c.tokens for j in plan.saves for c in j.chunks]

    assert from_the_engines_own_cache("b") == []
    assert from_the_engines_own_cache("c", kv_transfer_params={"do_remote_decode": True}) == [8, 8]
    world.store.clear()
    assert from_the_engines_own_cache("d") == [8, 8, 3]


def test_mode_never_loads_only_what_is_handed_over(world):
    compute_all(world, "a", range(19))
    side = SchedulerSide(world.client, LAYOUT, "model", workers=1, instance="x", mode="never")
    assert side.matched(request("b", range(19)), 0) == (0, False)
    assert side._requests["b"].choice.reason == "never"
    assert side.matched(request("c", range(19), kv_transfer_params=PROMISE), 0) == (19, True)


def computing_is_faster(side):
    for n in (8, 16, 19):
        side._breakeven.computing.add(n, n * 1e-6)
        side._breakeven.loading.add(n, 1.0)


def test_a_hit_that_would_take_longer_than_computing_is_computed_and_counted(world):
    compute_all(world, "a", range(19))
    computing_is_faster(world.side)
    r = request("b", range(19))
    assert world.side.matched(r, 0) == (0, False)
    assert world.store.stats()["leases"] == 0
    world.side.allocated(r, [30, 31, 32, 33, 34], 0)
    stats = world.side.stats.take()
    assert stats.data["decisions"] == {"slower": 1}
    assert world.side.stats.take() is None


def test_a_lookup_without_an_answer_is_counted_and_told_as_one_and_not_as_a_miss(world):
    compute_all(world, "a", range(19))
    world.side.stats.take()
    r = request("b", range(19))
    world.client.connected = False
    assert world.side.matched(r, 0) == (0, False)
    choice = world.side._requests["b"].choice
    assert (choice.load, choice.reason, choice.detail) == (False, "unavailable", "none")
    world.side.allocated(r, [30, 31, 32, 33, 34], 0)
    assert world.side.stats.take().data["decisions"] == {"unavailable": 1}


def test_no_blocks_were_free_and_the_second_lookup_is_answered(world):
    compute_all(world, "a", range(19))
    r = request("b", range(19))
    world.client.connected = False
    assert world.side.matched(r, 0) == (0, False)
    world.client.connected = True
    assert world.side.matched(r, 0) == (19, True)
    assert world.side._requests["b"].choice.reason == "unmeasured"


def test_what_was_found_and_not_loaded_is_told_after_its_lease_has_gone_back(world):
    compute_all(world, "a", range(19))
    computing_is_faster(world.side)
    r = request("b", range(19))
    assert world.side.matched(r, 0) == (0, False)
    assert world.side._requests["b"].left == (0, 3)
    world.side.allocated(r, [30, 31, 32, 33, 34], 0)
    known = world.side._facts._decided["b"]
    assert (known["first"], known["found"], known["why"]) == (0, 3, "slower")
    world.store.clear()
    assert world.side.matched(r, 0) == (0, False)  # asked once more, it is gone
    tracked = world.side._requests["b"]
    assert (tracked.left, tracked.choice) == ((0, 0), None)


def test_patience_is_a_factor_on_what_a_lookup_and_a_handover_get(world, monkeypatch):
    side = SchedulerSide(world.client, LAYOUT, "model", workers=1, instance="x", patience=20)
    given = []
    monkeypatch.setattr(
        world.client, "lookup", lambda keys, timeout, speed: given.append(timeout) or wire.LookupReply(1, 0, [], 0, 0)
    )
    assert side.matched(request("a", range(19)), 0) == (0, False)
    assert given == [20 * finding.LOOKUP_S]
    assert side._finder._stall_s(request("b", range(19))) == 20 * finding.HANDOVER_STALL_S


def test_after_a_reset_nothing_stored_before_is_used_and_what_is_stored_then_is(world):
    compute_all(world, "a", range(19))
    running = request("b", range(40, 59))
    assert world.side.matched(running, 0) == (0, False)
    world.side.allocated(running, [20, 21, 22, 23, 24], 0)
    world.side.reset()
    # What runs may hold KV of before and of after: it is not stored.
    assert not world.side.plan(step({"b": 19}, new=[("b", 0)])).saves
    _, plan = compute_all(world, "c", range(19))
    assert [c.tokens for j in plan.saves for c in j.chunks] == [8, 8, 3]
    assert world.side.matched(request("d", range(19)), 0) == (19, True)


def test_a_reset_while_a_hit_waits_for_blocks_gives_its_lease_back(world):
    compute_all(world, "a", range(19))
    again = request("b", range(19))
    assert world.side.matched(again, 0) == (19, True)
    world.side.reset()
    assert world.store.stats()["leases"] == 0
    assert world.side.matched(again, 0) == (0, False)


def test_a_step_says_whether_it_computes_anything(world):
    compute_all(world, "a", range(19))
    assert world.side.plan(step({})).idle
    assert not world.side.plan(step({"a": 1}, cached=[("a", None, 19)])).idle


def test_an_answer_is_minded_in_short_steps_and_not_beside_a_long_prefill(world):
    compute_all(world, "a", range(19))
    one = ("a", None, 19)
    assert world.side.plan(step({"a": 1}, cached=[one])).answers == 1
    long = world.side.plan(step({"a": 1, "b": LONG_STEP}, new=[("b", 0)], cached=[one]))
    assert long.answers == 0
    assert world.side.plan(step({"a": 1, "b": LONG_STEP // 2}, cached=[one, ("b", None, LONG_STEP)])).answers == 1
    assert not world.side.plan(step({"c": 8}, new=[("c", 0)])).answers
    compute_all(world, "d", range(30, 49))
    assert world.side.plan(step({"a": 1, "d": 1}, cached=[one, ("d", None, 19)])).answers == 2


def test_the_daemon_is_not_asked_about_fewer_tokens_than_a_load_is_worth(world, monkeypatch):
    asked = []
    lookup = world.client.lookup
    monkeypatch.setattr(world.client, "lookup", lambda keys, *a: asked.append(len(keys)) or lookup(keys, *a))
    world.side._finder._least = 6
    r = request("a", range(21))
    assert world.side.matched(r, 16) == (0, False)  # five are left
    world.side.allocated(r, list(range(6)), 0)
    assert asked == []
    assert world.side.stats.take().data["decisions"] == {"short": 1}
    assert world.side.matched(request("b", range(22)), 16) == (0, False)
    assert asked == [1]


def test_lower_tiers_are_asked_ahead_only_while_others_compute(world, monkeypatch):
    asked = []
    monkeypatch.setattr(world.client, "prefetch", lambda keys, timeout: asked.append(len(keys)) or 0, raising=False)
    one, other = request("a", range(19)), request("b", range(40, 59))
    world.side.arrived(one)
    assert asked == [], "nothing computes yet"
    world.side.allocated(one, list(range(5)), 0)
    world.side.plan(step({"a": 19}, new=[("a", 0)]))
    world.side.arrived(other)
    assert asked == [3]
    world.side.finished(one)
    world.side.arrived(request("c", range(80, 99)))
    assert asked == [3, 3], "one is still there"
    for rid in "bc":
        world.side.finished(request(rid, range(19)))
    world.side.arrived(request("d", range(19)))  # the engine need not have stepped since
    assert asked == [3, 3]

"""Chunks brought up from lower tiers, and deleted from them."""

import time

import pytest
from tier_world import SHARD, Together, key

from pdserve.transfer.allocator import PAGE
from pdserve.transfer.tiers.breaker import BreakerOptions, Guarded
from pdserve.transfer.tiers.memory import MemoryTier
from pdserve.transfer.wire import EXISTS, GRANTED


def test_what_was_evicted_comes_back_from_below_whole_and_with_its_tier_named(world):
    w = world()
    for i in (1, 2, 3):
        w.put(i)
    w.forget()
    assert w.lookup(1, 2, 3, 4) == ([], 3)
    assert w.fetch(1, 2, 3, 4) == ["memory"] * 3
    assert w.value("cache_tier_chunks_total", "memory", "up") == 3
    assert w.value("cache_tier_bytes_total", "memory", "down") == 3 * 2 * SHARD
    assert w.store.peek(key(1)).tag == b"tenant"


def test_a_chunk_on_its_way_up_is_not_found_not_granted_and_not_pending(world):
    w = world()
    w.put(1)
    w.forget()
    w.tier.faults.stall()
    assert w.lookup(1) == ([], 1)
    assert w.store.lookup([key(1)], 2, 0.0) == (0, [], 0)
    assert w.put(1) != GRANTED
    w.tier.faults.resume()
    w.settle()
    assert w.lookup(1) == (["memory"], 0)
    assert w.put(1) == EXISTS


def test_the_run_goes_on_over_chunks_that_are_here_and_ends_at_the_first_that_is_nowhere(world):
    w = world()
    for i in (1, 2, 3, 5):
        w.put(i)
    w.forget()
    w.put(2)
    assert w.lookup(1, 2, 3, 4, 5) == ([], 2)
    w.settle()
    assert w.lookup(1, 2, 3, 4, 5) == (["memory", "dram", "memory"], 0)


@pytest.mark.parametrize("trouble", ["flip", "error", "gone"])
def test_what_cannot_be_read_is_a_miss_and_its_space_comes_back(world, trouble):
    w = world()
    w.put(1)
    w.forget()
    if trouble == "flip":
        w.tier.corrupt(key(1), SHARD + 3)
    if trouble == "gone":
        w.tier.get = lambda *a: False
    if trouble == "error":

        def fail(*a):
            raise ZeroDivisionError("somebody else's bug")

        w.tier.get = fail
    assert w.lookup(1) == ([], 1)
    w.settle()
    assert w.lookup(1) == ([], 0)
    assert w.store.stats()["used_bytes"] == 0
    assert w.value("cache_digest_failures_total", "memory") == (trouble == "flip")
    assert w.tier.quarantined == ([key(1)] if trouble == "flip" else [])
    assert w.put(1) == GRANTED


def test_a_tier_that_is_slow_is_not_promised_but_tried_one_at_a_time(world):
    w = world()
    for i in (1, 2, 3):
        w.put(i)
    w.forget()
    w.lower.rate = 10.0
    assert w.lookup(1, 2, 3) == ([], 0)
    assert w.lower.up == 1
    w.settle()
    assert w.lookup(1, 2, 3)[0] == ["memory"]  # it came, and was quick: now the others are promised
    assert w.lower.up >= 1


def test_loads_are_bounded_by_a_share_of_the_arena(world):
    w = world()
    for i in range(1, 11):
        w.put(i)
    w.forget()
    w.tier.faults.stall()
    assert w.lookup(*range(1, 11)) == ([], 10)
    assert w.store.stats()["used_bytes"] <= w.arena.size // 4 + 4 * PAGE
    w.tier.faults.resume()
    found = []
    while len(found) < 10:
        w.settle()
        found, loading = w.lookup(*range(1, 11))
        assert found or loading


def test_a_prefix_longer_than_dram_ends_in_a_miss_not_in_waiting(world):
    w = world(pages=8)
    for i in range(1, 6):
        w.put(i)
        w.settle()
        if i == 2:
            w.store.drop([key(1), key(2)], "cleared")
    w.forget()
    for _ in range(20):
        found, loading = w.lookup(1, 2, 3, 4, 5)
        w.settle()
        if not loading:
            break
    assert (found, loading) == (["memory"] * 2, 0)


def test_chunks_left_in_the_arena_are_found_once_verified_and_wrong_ones_never(world):
    w = world(pages=12)
    w.put(1)
    w.put(2)
    w.settle()
    chunks = [w.store.peek(key(i)) for i in (1, 2)]
    left = [(c.record(), c.offset) for c in chunks]
    again = world(pages=12)
    again.arena[:] = w.arena
    again.arena[left[1][1] + 5] ^= 1
    overlapping = (left[0][0], left[0][1])
    assert again.tiering.verify_in_place([*left, overlapping, (left[0][0], 1 << 40)]) == 2
    assert again.lookup(1) == ([], 1)
    again.turn(lambda: not again.tiering.recovering)
    assert again.lookup(1) == (["dram"], 0)
    assert again.lookup(2) == ([], 0)
    assert again.store.stats()["used_bytes"] == 4 * PAGE
    assert again.value("cache_recovered_chunks_total", "dropped") == 3
    again.tiering.tick(time.monotonic())
    assert again.lookup(1) == (["dram"], 0)


def test_deleting_goes_down_to_the_tiers(world):
    w = world()
    w.put(1)
    w.forget()
    w.tiering.delete([key(1)])
    w.turn(lambda: w.tier.stats()["chunks"] == 0)
    assert w.lookup(1) == ([], 0)


def test_what_is_being_deleted_is_not_brought_up_and_may_be_stored_anew(world):
    """The tier deletes on its own thread; until then it has the chunk, and who asks must not get it into memory again."""
    tier = Together()
    tier.open.set()
    w = world(tier)
    for i in (1, 2, 11):
        w.put(i, shards=1)
    w.forget()
    tier.open.clear()
    w.tiering.delete([key(1), key(2)])
    assert w.lookup(1) == ([], 0)
    assert not w.tiering.bring_up(key(1), time.monotonic())
    assert w.lookup(11) == ([], 1)  # others are
    w.settle = lambda: None
    assert w.put(2, shards=1) == GRANTED
    tier.open.set()
    w.turn(lambda: not w.tiering.deleting and not w.lower.down and not w.lower.up and w.posted.empty())
    assert [w.tier.contains([key(i)])[0] is not None for i in (1, 2, 11)] == [False, True, True]
    assert w.lookup(1) == ([], 0)
    del w.settle
    w.forget()
    assert w.fetch(2) == ["memory"]


def test_while_a_tier_is_cleared_nothing_comes_from_it(world):
    tier = Together()
    tier.open.set()
    tier.clear = lambda: tier.delete([key(1)])
    w = world(tier)
    w.put(1)
    w.forget()
    tier.open.clear()
    w.tiering.clear()
    assert w.lookup(1) == ([], 0)
    tier.open.set()
    w.turn(lambda: not w.tiering.deleting)
    assert w.lookup(1) == ([], 0)


@pytest.mark.parametrize("how", ["drop", "choose", "clear"])
def test_what_is_deleted_before_it_is_verified_is_told_at_once(world, how):
    """So that the journal does not bring it back when the daemon is killed before it has come to it."""
    w = world(pages=12)
    w.put(1)
    chunk = w.store.peek(key(1))
    again = world(pages=12)
    again.arena[:] = w.arena
    told = []
    again.store.on_forgotten.append(lambda chunk: told.append((chunk.key, again.store.removing)))
    assert again.tiering.verify_in_place([(chunk.record(), chunk.offset)]) == 1
    if how == "clear":
        again.store.clear()
        again.tiering.clear()
    else:
        again.store.drop([key(1)] if how == "drop" else [], "dropped")
        again.tiering.delete([key(1)] if how == "drop" else [], (lambda records: []) if how == "choose" else None)
    assert told == [(key(1), "cleared" if how == "clear" else "dropped")]
    assert again.lookup(1) == ([], 0)
    again.turn(lambda: not again.tiering.recovering)
    assert again.lookup(1) == ([], 0)
    assert len(told) == 1
    assert again.store.stats()["used_bytes"] == 0


def test_behind_a_breaker_a_tier_that_fails_is_left_alone_and_comes_back(world):
    inner, later = MemoryTier(), [0.0]
    options = BreakerOptions(failures=2, first_pause=600.0, longest_pause=600.0)
    guarded = Guarded(inner, options=options, clock=lambda: time.monotonic() + later[0])
    guarded.faults = inner.faults
    w = world(tier=guarded)
    w.put(1)
    w.forget()
    inner.faults.fail_next = 2
    for i in (11, 12):
        w.put(i)
    assert w.tiering.stats()["memory"]["circuit"] == "open"
    w.put(13)
    assert inner.stats()["chunks"] == 1
    later[0] = 601.0
    ends = time.monotonic() + 60
    i = 20
    while w.tiering.stats()["memory"]["circuit"] != "closed":
        assert time.monotonic() < ends
        i += 2
        w.put(i)
        time.sleep(0.05)
    assert w.fetch(1) == ["memory"]

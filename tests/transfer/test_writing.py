"""Chunks written down to lower tiers."""


import pytest
from tier_world import Together, key

from pdserve.transfer import writing
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.lower import MOST_TOGETHER
from pdserve.transfer.wire import GRANTED


def test_a_queue_that_is_full_drops_writes_and_holds_little(world):
    w = world(max_queued=3)
    w.tier.faults.stall()
    for i in range(1, 9):
        assert w.put(i, shards=1) == GRANTED
    assert w.value("cache_tier_dropped_writes_total", "memory") >= 5
    w.tier.faults.resume()
    w.settle()
    assert 1 <= w.tier.stats()["chunks"] <= 3
    assert w.store.stats()["leases"] == 0
    w.store.clear()
    assert w.store.stats()["used_bytes"] == 0


def test_a_prompt_goes_down_whole_where_dram_is_hardly_larger(world):
    """Five chunks committed together in an arena of twelve, behind a tier that answers only then."""
    w = world(pages=48)
    w.tier.faults.stall()
    for i in range(1, 6):
        assert w.put(i) == GRANTED
    assert w.value("cache_tier_dropped_writes_total", "memory") == 0
    assert w.put(6) == w.put(7) == GRANTED
    assert w.value("cache_tier_dropped_writes_total", "memory") == 1, "half of the arena stays free for requests"
    w.tier.faults.resume()
    w.settle()
    w.forget()
    assert w.fetch(1, 2, 3, 4, 5) == ["memory"] * 5


def test_writes_that_wait_are_carried_out_together_and_in_order_with_what_is_deleted(world):
    tier = Together()
    w = world(tier, pages=400)
    w.settle = lambda: None  # what is put waits at the gate
    for i in range(1, 5):
        assert w.put(i, shards=1) == GRANTED
    w.tiering.delete([key(3)])
    for i in range(5, 20):
        assert w.put(i, shards=1) == GRANTED
    tier.open.set()
    w.turn(lambda: not w.lower.down and not w.tiering.deleting and w.posted.empty())
    order = [k for call in tier.calls for k in call]
    assert order == [*map(key, range(1, 5)), "delete", key(3), *map(key, range(5, 20))]
    assert max(map(len, tier.calls)) <= MOST_TOGETHER
    assert len(tier.calls) <= 2 + 1 + 2 + 1  # how many wait when the thread looks is its own matter
    assert [w.tier.contains([key(i)])[0] is not None for i in range(1, 20)] == [i != 3 for i in range(1, 20)]
    assert w.lower.down_bytes == 0


@pytest.mark.parametrize(
    "wrong", [lambda stored: stored[:-1], lambda stored: 1 / 0, lambda stored: [False] * len(stored)]
)
def test_writes_together_that_end_badly_hold_nothing(world, wrong):
    tier = Together(wrong)
    w = world(tier, pages=400)
    w.settle = lambda: None
    for i in range(1, 9):
        assert w.put(i, shards=1) == GRANTED
    tier.open.set()
    w.turn(lambda: not w.lower.down and w.posted.empty())
    assert w.lower.down_bytes == 0
    assert all(not chunk.leases for chunk in w.store.chunks())


def test_a_chunk_being_written_down_is_not_evicted_and_its_space_not_reused(world):
    w = world(pages=4)
    w.tier.faults.stall()
    w.put(1)  # all of the arena
    assert w.put(11) != GRANTED
    w.store.drop([key(1)], "cleared")
    assert w.store.stats()["used_bytes"] == 4 * PAGE  # out of the index, the bytes still being read
    assert w.put(11) != GRANTED
    w.tier.faults.resume()
    w.settle()
    assert w.put(11) == GRANTED


def test_writes_that_fail_are_counted_and_offered_again_when_the_chunk_is_used(world):
    w = world(write="selective")
    w.put(1)
    w.settle()
    assert w.tier.stats()["chunks"] == 0
    w.tier.faults.fail_next = 1
    w.tiering.writing.used([w.store.peek(key(1))])
    w.settle()
    assert w.value("cache_tier_failures_total", "memory", "put", "error") == 1
    w.tiering.writing.used([w.store.peek(key(1))])
    w.settle()
    assert w.tier.stats()["chunks"] == 1
    assert w.tier.touched == [key(1)] * 2


def test_on_evict_writes_the_coldest_ahead_of_need_and_nothing_before(world):
    w = world(write="on-evict")
    for i in range(1, 5):
        w.put(10 * i, shards=2)
    w.tiering.writing.relieve()
    w.settle()
    assert w.tier.stats()["chunks"] == 0
    for i in range(5, 11):
        w.put(10 * i, shards=2)  # 10 x 4 pages: full
        w.tiering.writing.relieve()
    w.settle()
    w.tiering.writing.relieve()
    w.settle()
    assert w.store.stats()["used_bytes"] <= 36 * PAGE
    assert w.tier.contains([key(10)])[0] is not None
    assert w.lookup(10) == ([], 1)


def test_ahead_of_need_only_so_many_are_evicted_in_a_turn(world, monkeypatch):
    monkeypatch.setattr(writing, "A_TURN", 2)
    w = world(write="on-evict")
    for i in range(1, 11):
        w.put(10 * i, shards=2)
    for chunk in w.store.chunks():
        chunk.below |= w.tiering.lowers[0].bit  # written when they were here before
    left = []
    for _ in range(3):
        w.tiering.writing.relieve()
        left.append(w.store.stats()["chunks"])
    assert left == [8, 8, 8]  # 0.8 of the arena: enough
    w.put(110, shards=2)
    w.put(120, shards=2)
    monkeypatch.setattr(writing, "A_TURN", 1)
    w.tiering.writing.relieve()
    assert w.store.stats()["chunks"] == 9


def test_an_unknown_write_policy_is_refused_with_the_known_ones(world):
    with pytest.raises(ValueError, match="write-through, on-evict, selective"):
        world(write="sometimes")

"""What remote tiers are asked, and what is remembered of it."""

import time

import pytest
from tier_world import key

from pdserve.transfer.tiers.memory import MemoryTier


def test_remote_tiers_are_asked_in_the_background_and_answers_kept(world):
    w = world(tier=MemoryTier())
    w.put(1)
    w.put(2)
    w.forget()
    asked = []
    contains = w.tier.contains
    w.tier.contains = lambda keys: asked.append(keys) or contains(keys)
    assert w.lookup(1, 2, 3) == ([], 3)  # not known yet: worth asking again in a moment
    w.turn(lambda: not w.tiering.remote._known[key(3)].asking)
    assert w.lookup(1, 2, 3) == ([], 2)
    w.settle()
    assert w.lookup(1, 2, 3) == (["memory"] * 2, 0)
    assert w.lookup(1, 2, 3) == (["memory"] * 2, 0)
    assert len(asked) == 1


def test_a_remote_tier_that_does_not_answer_costs_a_moment(world, monkeypatch):
    monkeypatch.setattr("pdserve.transfer.remote.ASK_S", 0.05)
    w = world(tier=MemoryTier())
    w.tier.faults.stall()
    assert w.lookup(1) == ([], 1)
    time.sleep(0.06)
    assert w.lookup(1) == ([], 0)


def test_a_store_that_is_asked_for_each_key_is_asked_in_slices_up_to_the_first_gap(world, monkeypatch):
    monkeypatch.setattr("pdserve.transfer.remote.SLICES", {"memory": 2})
    w = world(tier=MemoryTier())
    for i in (1, 2, 3):
        w.put(i)
    w.forget()
    asked = []
    contains = w.tier.contains
    w.tier.contains = lambda keys: asked.append(len(keys)) or contains(keys)
    w.lookup(*range(1, 10))
    w.turn(lambda: not w.tiering.remote._known[key(9)].asking)
    assert asked == [2, 2]
    assert w.fetch(*range(1, 10)) == ["memory"] * 3


def test_an_answer_to_a_question_that_was_forgotten_counts_for_nothing(world):
    """The key was deleted while the tier was asked, and is asked for again: both answers come."""
    w = world(tier=MemoryTier())
    w.tier.faults.stall()
    w.lookup(1)
    w.tiering.remote.forget(key(1))
    w.lookup(1)
    w.tier.faults.resume()
    for answer in [w.posted.get(timeout=30) for _ in range(2)]:
        answer()
    w.tiering.tick(time.monotonic() + 100)
    assert not w.tiering.remote._known


@pytest.mark.parametrize("lost", ["gone", "corrupt"])
def test_what_a_remote_tier_turns_out_not_to_have_is_asked_for_anew(world, lost):
    """Another host may have deleted it since: nobody waits for it again on the old answer's word."""
    w = world(tier=MemoryTier())
    w.put(1)
    w.forget()
    w.lookup(1)
    w.turn(lambda: w.tiering.below(key(1)))
    w.tier.corrupt(key(1), 0) if lost == "corrupt" else w.tier.delete([key(1)])
    assert w.lookup(1) == ([], 1)
    w.settle()
    assert not w.tiering.below(key(1))

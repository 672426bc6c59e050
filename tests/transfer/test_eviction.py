import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.transfer.eviction import POLICIES, LeafFirstCost, LeafFirstLru, recompute_cost


def key(i: int) -> bytes:
    return i.to_bytes(32, "little")


def check_policy(make, seed: int) -> None:
    """What every policy owes: no victim with children, none that is pinned, and all go in the end."""
    rng = random.Random(seed)
    policy = make()
    parent, pins = {}, {}
    for i in range(1, 120):
        what = rng.random()
        if what < 0.5 or not parent:
            p = rng.choice([0, *parent]) if parent else 0
            parent[i], pins[i] = p, 0
            policy.add(key(i), key(p) if p else b"")
        elif what < 0.7:
            policy.touch(key(rng.choice(list(parent))))
        elif what < 0.8:
            j = rng.choice(list(parent))
            pins[j] += 1
            policy.pin(key(j))
        elif what < 0.9 and any(pins.values()):
            j = rng.choice([j for j in pins if pins[j]])
            pins[j] -= 1
            policy.unpin(key(j))
        else:
            victim = policy.victim()
            leaves = {j for j in parent if j not in parent.values() and not pins[j]}
            assert (victim is None) == (not leaves)
            if victim is not None:
                j = int.from_bytes(victim, "little")
                assert j in leaves
                policy.remove(victim)
                del parent[j], pins[j]
    for j, n in pins.items():
        for _ in range(n):
            policy.unpin(key(j))
    for _ in range(len(parent)):
        policy.remove(policy.victim())
    assert policy.victim() is None


@settings(deadline=None)
@given(st.sampled_from(sorted(POLICIES)), st.integers())
def test_conformance(name, seed):
    check_policy(POLICIES[name], seed)


def test_lru_takes_the_deepest_chunk_of_the_coldest_prefix():
    lru = LeafFirstLru()
    for i in (1, 2, 3):
        lru.add(key(i), key(i - 1) if i > 1 else b"")
    for i in (11, 12):
        lru.add(key(i), key(i - 1) if i > 11 else b"")
    for i in (3, 2, 1):
        lru.touch(key(i))
    order = []
    while (v := lru.victim()) is not None:
        order.append(int.from_bytes(v, "little"))
        lru.remove(v)
    assert order == [12, 11, 3, 2, 1]


def chain(policy, *ids):
    for above, i in zip((0, *ids), ids, strict=False):
        policy.add(key(i), key(above) if above else b"")


def use(policy, *ids):
    for i in reversed(ids):
        policy.touch(key(i))


def evict(policy, count=1):
    gone = []
    for _ in range(count):
        victim = policy.victim()
        policy.remove(victim)
        gone.append(int.from_bytes(victim, "little"))
    return gone


def test_cost_keeps_the_dear_end_of_a_long_prompt_before_the_cheap_start_of_a_newer_one():
    policy, long = LeafFirstCost(), tuple(range(1, 301))
    chain(policy, *long)
    chain(policy, 1001, 1002)
    assert evict(policy, 2) == [1002, 1001]
    lru = LeafFirstLru()
    chain(lru, *long)
    chain(lru, 1001, 1002)
    assert evict(lru, 2) == [300, 299]


def test_cost_does_not_keep_for_ever_what_nobody_uses():
    policy, long = LeafFirstCost(), tuple(range(1, 301))
    chain(policy, *long)
    gone = []
    for i in range(2000, 2400):  # one small prompt after the other
        policy.add(key(i), b"")
        gone += evict(policy)
    assert [i for i in gone if i <= 300] == list(reversed(long))


def test_cost_forgets_how_often_a_finished_conversation_was_used():
    policy = LeafFirstCost()
    chain(policy, 1, 2)
    for _ in range(100):
        use(policy, 1, 2)
    for i in range(10, 20):
        policy.add(key(i), b"")
        evict(policy)
    assert key(2) not in policy._nodes


def test_dropping_a_dear_chunk_does_not_make_all_others_look_old():
    policy, long = LeafFirstCost(), tuple(range(1, 301))
    chain(policy, 1001)
    chain(policy, *long)
    for i in reversed(long[1:]):
        policy.remove(key(i))  # not the victims: 1001 is
    policy.add(key(1002), b"")
    assert policy._nodes[key(1001)].rank == policy._nodes[key(1002)].rank == 1.0


def test_a_deeper_chunk_costs_more():
    costs = [recompute_cost(depth) for depth in range(1000)]
    assert costs[0] == 1.0
    assert costs == sorted(set(costs))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_heap_does_not_grow_with_touches(name):
    lru = POLICIES[name]()
    for i in range(1, 11):
        lru.add(key(i), b"")
    for i in range(100_000):
        lru.touch(key(1 + i % 10))
    assert len(lru._heap) < 200


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_whoever_asks_for_a_victim_finds_few_stale_entries_before_it(name):
    policy = POLICIES[name]()
    chain(policy, *range(1, 401))
    assert len(policy._heap) == 1  # not one for each chunk that was a leaf for a moment
    for _ in range(100):  # a prompt that is looked up again and again
        for i in range(400, 0, -1):
            policy.touch(key(i))
            policy.pin(key(i))
        for i in range(1, 401):
            policy.unpin(key(i))
    assert len(policy._heap) == 1
    assert policy.victim() == key(400)

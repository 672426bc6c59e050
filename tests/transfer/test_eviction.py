import random

from hypothesis import given
from hypothesis import strategies as st

from pdserve.transfer.eviction import POLICIES, LeafFirstLru


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


def test_the_heap_does_not_grow_with_touches():
    lru = LeafFirstLru()
    for i in range(1, 11):
        lru.add(key(i), b"")
    for i in range(100_000):
        lru.touch(key(1 + i % 10))
    assert len(lru._heap) < 200

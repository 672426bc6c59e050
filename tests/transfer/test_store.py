"""The index against a plain model, and every rule of the chunk's life."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from prometheus_client import CollectorRegistry

from pdserve.metrics.cache import CACHE
from pdserve.metrics.metric import build
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.eviction import LeafFirstLru
from pdserve.transfer.store import LEASE_S, RESERVATION_S, Store
from pdserve.transfer.wire import BUSY, EXISTS, FULL, GRANTED, TOO_LARGE, CommitItem, ReserveItem


def make(pages: int) -> Store:
    return Store(pages * PAGE, LeafFirstLru(), build(CACHE, CollectorRegistry()))


def key(i: int) -> bytes:
    return i.to_bytes(32, "little")


def item(i: int, parent: int = 0, pages: int = 1, shard: int = 0, shards: int = 1) -> ReserveItem:
    return ReserveItem(key(i), key(parent) if parent else b"", shard, shards, pages * PAGE, 256)


def put(store: Store, i: int, parent: int = 0, pages: int = 1, client: int = 1) -> None:
    (grant,) = store.reserve([item(i, parent, pages)], "w", client, 0.0)
    assert grant.status == GRANTED
    assert store.commit([CommitItem(grant.reservation, i)], client) == 1


def hits(store: Store, *ids: int) -> int:
    lease, found, _ = store.lookup([key(i) for i in ids], 99, 0.0)
    if lease:
        assert store.release(lease, 99)
    return len(found)


def test_nothing_is_found_before_it_is_committed():
    s = make(10)
    (g,) = s.reserve([item(1)], "w", 1, 0.0)
    assert s.lookup([key(1)], 2, 0.0) == (0, [], 1)
    s.commit([CommitItem(g.reservation, 7)], 1)
    lease, found, pending = s.lookup([key(1)], 2, 0.0)
    assert (lease > 0, found[0].digests, pending) == (True, [7], 0)


def test_a_lookup_stops_at_the_first_gap():
    s = make(10)
    for i in (1, 2, 4):
        put(s, i, i - 1)
    assert hits(s, 1, 2, 3, 4) == 2


def test_all_shards_make_a_chunk():
    s = make(10)
    (a,) = s.reserve([item(1, shards=2, shard=0)], "w", 1, 0.0)
    (b,) = s.reserve([item(1, shards=2, shard=1)], "w", 2, 0.0)
    assert b.offset - a.offset == PAGE
    s.commit([CommitItem(a.reservation, 5)], 1)
    assert hits(s, 1) == 0
    s.commit([CommitItem(b.reservation, 6)], 2)
    _, found, _ = s.lookup([key(1)], 9, 0.0)
    assert found[0].digests == [5, 6]


def ranged(shard: int, count: int) -> ReserveItem:
    return ReserveItem(key(1), b"", shard, 8, PAGE, 256, count=count)


def test_workers_bring_ranges_of_shards_and_the_last_one_makes_the_chunk_visible():
    s = make(20)
    (a,) = s.reserve([ranged(0, 4)], "w", 1, 0.0)
    assert s.reserve([ranged(3, 5)], "w", 2, 0.0)[0].status == BUSY  # shard 3 is being written
    (b,) = s.reserve([ranged(4, 4)], "w", 2, 0.0)
    assert b.offset - a.offset == 4 * PAGE
    assert s.commit([CommitItem(a.reservation, 1, [2, 3])], 1) == 0  # a digest is missing
    assert s.commit([CommitItem(a.reservation, 1, [2, 3, 4])], 1) == 1
    assert hits(s, 1) == 0
    s.commit([CommitItem(b.reservation, 5, [6, 7, 8])], 2)
    assert s.lookup([key(1)], 9, 0.0)[1][0].digests == [1, 2, 3, 4, 5, 6, 7, 8]


def test_two_engines_storing_the_same_chunk_store_it_once():
    s = make(10)
    (a,) = s.reserve([item(1)], "one", 1, 0.0)
    assert s.reserve([item(1)], "two", 2, 0.0)[0].status == BUSY
    s.commit([CommitItem(a.reservation, 5)], 1)
    assert s.reserve([item(1)], "two", 2, 0.0)[0].status == EXISTS
    assert s.stats()["used_bytes"] == PAGE


def test_a_shard_is_granted_once():
    s = make(10)
    s.reserve([item(1, shards=2, shard=0)], "w", 1, 0.0)
    assert s.reserve([item(1, shards=2, shard=0)], "w", 3, 0.0)[0].status == BUSY


def test_children_go_before_their_parents_and_the_cold_before_the_warm():
    s = make(4)
    for i in (1, 2):
        put(s, i, i - 1)
    for i in (11, 12):
        put(s, i, i - 1 if i > 11 else 0)
    assert hits(s, 1, 2) == 2
    put(s, 21)
    assert (hits(s, 1, 2), hits(s, 11, 12)) == (2, 1)


def test_leased_chunks_are_not_evicted():
    s = make(2)
    put(s, 1)
    put(s, 2)
    lease, _, _ = s.lookup([key(1)], 5, 0.0)
    put(s, 3)
    assert (hits(s, 1), hits(s, 2)) == (1, 0)
    s.lookup([key(3)], 5, 0.0)
    assert s.reserve([item(4)], "w", 1, 0.0)[0].status == FULL
    s.release(lease, 5)
    assert s.reserve([item(4)], "w", 1, 0.0)[0].status == GRANTED


def test_a_prompt_larger_than_the_cache_keeps_its_beginning():
    s = make(3)
    statuses = [s.reserve([item(i, i - 1)], "w", 1, 0.0)[0] for i in (1, 2, 3)]
    for i, g in enumerate(statuses, 1):
        s.commit([CommitItem(g.reservation, i)], 1)
    assert s.reserve([item(4, 3)], "w", 1, 0.0)[0].status == FULL
    assert hits(s, 1, 2, 3, 4) == 3


def test_what_can_never_fit_is_refused_without_evicting_anything():
    s = make(3)
    put(s, 1)
    assert s.reserve([item(2, pages=4)], "w", 1, 0.0)[0].status == TOO_LARGE
    assert hits(s, 1) == 1


def test_a_dead_writer_leaves_nothing_and_its_space_comes_back():
    s = make(2)
    s.reserve([item(1, pages=2)], "w", 1, 0.0)
    s.client_gone(1)
    assert s.stats() == {"chunks": 0, "used_bytes": 0, "capacity_bytes": 2 * PAGE, "leases": 0, "reservations": 0}


def test_a_late_writer_loses_the_key_but_its_space_is_nobody_elses_until_it_is_done():
    s = make(1)
    (g,) = s.reserve([item(1)], "w", 1, 0.0)
    s.expire(RESERVATION_S + 1)
    assert s.lookup([key(1)], 2, 0.0)[2] == 0
    assert s.reserve([item(2)], "v", 2, 0.0)[0].status == FULL  # the late one may still be writing there
    assert s.commit([CommitItem(g.reservation, 1)], 1) == 0
    assert hits(s, 1) == 0
    assert s.reserve([item(2)], "v", 2, 0.0)[0].status == GRANTED


def test_a_dropped_chunk_that_is_being_read_keeps_its_space_until_the_lease_ends():
    s = make(1)
    put(s, 1)
    lease, _, _ = s.lookup([key(1)], 5, 0.0)
    assert s.drop([key(1)], "corrupt") == 1
    assert hits(s, 1) == 0
    assert s.reserve([item(2)], "w", 1, 0.0)[0].status == FULL
    s.release(lease, 5)
    assert s.reserve([item(2)], "w", 1, 0.0)[0].status == GRANTED


def test_leases_end_by_themselves_and_belong_to_their_client():
    s = make(1)
    put(s, 1)
    lease, _, _ = s.lookup([key(1)], 5, 0.0)
    assert not s.release(lease, 6)
    s.expire(LEASE_S + 1)
    assert not s.release(lease, 5)
    assert s.stats()["leases"] == 0


def test_an_abort_of_one_shard_takes_the_chunk_away():
    s = make(4)
    (a,) = s.reserve([item(1, shards=2, shard=0)], "w", 1, 0.0)
    (b,) = s.reserve([item(1, shards=2, shard=1)], "w", 2, 0.0)
    assert s.abort([a.reservation], 1) == 1
    assert s.stats()["used_bytes"] == 2 * PAGE  # the other rank may still be writing
    assert s.commit([CommitItem(b.reservation, 6)], 2) == 0
    assert s.stats()["used_bytes"] == 0


@pytest.mark.parametrize("client", [2, 0])
def test_nobody_commits_or_aborts_for_another(client):
    s = make(1)
    (g,) = s.reserve([item(1)], "w", 1, 0.0)
    assert s.commit([CommitItem(g.reservation, 1)], client) == 0
    assert s.abort([g.reservation], client) == 0


class Machine(RuleBasedStateMachine):
    """Random life: whatever happens, no two holders share a page, what is found was committed, and all space comes back."""

    def __init__(self):
        super().__init__()
        self.s = make(12)
        self.now = 0.0
        self.open = {}  # reservation -> (client, key, offset, pages)
        self.value = {}  # key -> digest of the last commit that counted
        self.leases = {}  # lease -> (client, [(offset, size)])

    @rule(i=st.integers(1, 8), chained=st.booleans(), pages=st.integers(1, 4), client=st.integers(1, 3))
    def reserve(self, i, chained, pages, client):
        (g,) = self.s.reserve([item(i, i - 1 if chained else 0, pages)], f"w{client}", client, self.now)
        if g.status == GRANTED:
            self.open[g.reservation] = (client, i, g.offset, pages)

    @rule(data=st.data())
    def commit(self, data):
        if self.open:
            rid = data.draw(st.sampled_from(sorted(self.open)))
            client, i, _, _ = self.open.pop(rid)
            if self.s.commit([CommitItem(rid, rid)], client):
                self.value[i] = rid

    @rule(data=st.data())
    def abort(self, data):
        if self.open:
            rid = data.draw(st.sampled_from(sorted(self.open)))
            self.s.abort([rid], self.open.pop(rid)[0])

    @rule(i=st.integers(1, 8), n=st.integers(1, 4), client=st.integers(1, 3))
    def lookup(self, i, n, client):
        lease, found, _ = self.s.lookup([key(j) for j in range(i, i + n)], client, self.now)
        for j, f in enumerate(found):
            assert f.digests == [self.value[i + j]]
        if lease:
            self.leases[lease] = (client, [(f.offset, f.stride * len(f.digests)) for f in found])

    @rule(data=st.data())
    def release(self, data):
        if self.leases:
            lease = data.draw(st.sampled_from(sorted(self.leases)))
            self.s.release(lease, self.leases.pop(lease)[0])

    @rule(i=st.integers(1, 8))
    def drop(self, i):
        self.s.drop([key(i)], "corrupt")

    @rule(seconds=st.sampled_from([1.0, 35.0, 70.0]))
    def wait(self, seconds):
        self.now += seconds
        self.s.expire(self.now)
        if seconds > LEASE_S:
            self.leases.clear()

    @rule(client=st.integers(1, 3))
    def die(self, client):
        self.s.client_gone(client)
        self.open = {r: v for r, v in self.open.items() if v[0] != client}
        self.leases = {x: v for x, v in self.leases.items() if v[0] != client}

    @invariant()
    def what_may_expire_is_what_is_not_visible(self):
        assert self.s._unfinished == {k: c for k, c in self.s._index.items() if not c.committed}

    @invariant()
    def writers_and_readers_never_meet(self):
        writing = [(o, o + p * PAGE) for _, _, o, p in self.open.values()]
        reading = {(o, o + n) for _, spans in self.leases.values() for o, n in spans}
        for k, (a, b) in enumerate(writing):
            for c, d in [*writing[k + 1 :], *reading]:
                assert b <= c or d <= a

    def teardown(self):
        for client in (1, 2, 3):
            self.s.client_gone(client)
        self.s.expire(self.now + 1000)
        self.s.clear()
        assert self.s.stats()["used_bytes"] == 0
        assert self.s.stats()["leases"] == self.s.stats()["reservations"] == 0


TestStore = Machine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)

"""The glue between the store and lower tiers: real threads, a memory tier that fails on demand, a loop that the test turns."""

import queue
import threading
import time

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from pdserve import kernels
from pdserve.metrics.cache import CACHE
from pdserve.metrics.metric import build
from pdserve.transfer import writing
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.eviction import LeafFirstLru
from pdserve.transfer.lower import MOST_TOGETHER, Rules
from pdserve.transfer.store import Store
from pdserve.transfer.tiering import Tiering
from pdserve.transfer.tiers.breaker import BreakerOptions, Guarded
from pdserve.transfer.tiers.memory import MemoryTier
from pdserve.transfer.wire import EXISTS, GRANTED, CommitItem, ReserveItem

SHARD = PAGE + 8  # not a whole page: the arena pads it


def key(i):
    return i.to_bytes(32, "little")


def content(i, shard=0):
    return np.full(SHARD, (i * 7 + shard) % 251, np.uint8)


class IndexedMemory(MemoryTier):
    indexed = True

    def __init__(self):
        super().__init__()
        self.quarantined, self.touched = [], []

    def contains(self, keys):
        return [self._chunks[k][0] if k in self._chunks else None for k in keys]

    def quarantine(self, k):
        self.quarantined.append(k)
        self.delete([k])

    def touch(self, keys):
        self.touched += keys


class Together(IndexedMemory):
    """Takes several at once, when `open` is set; `calls`: what it was asked for."""

    def __init__(self, answer=None):
        super().__init__()
        self.open, self.calls, self.answer = threading.Event(), [], answer

    def put(self, record, payload, deadline):
        return self._gated([record.key], lambda: super(Together, self).put(record, payload, deadline))

    def put_many(self, chunks, deadline):
        def each():
            stored = [super(Together, self).put(*c, deadline) for c in chunks]
            return self.answer(stored) if self.answer else stored

        return self._gated([record.key for record, _ in chunks], each)

    def delete(self, keys):
        return self._gated(["delete", *keys], lambda: super(Together, self).delete(keys))

    def _gated(self, what, do):
        self.calls.append(what)
        assert self.open.wait(30)
        return do()


class World:
    """A store over an array, one tier below, and the loop's queue."""

    def __init__(self, tier=None, pages=40, **rules):
        self.arena = np.zeros(pages * PAGE, np.uint8)
        self.metrics = build(CACHE, CollectorRegistry())
        self.store = Store(self.arena.size, LeafFirstLru(), self.metrics)
        self.posted = queue.Queue()
        self.tiering = Tiering(self.store, lambda: self.arena, self.metrics, self.posted.put)
        self.tier = tier or IndexedMemory()
        self.tiering.add(self.tier, Rules(**rules))
        self.lower = self.tiering.lowers[0]

    def turn(self, until, patience=60.0):
        """Runs what the threads have posted until `until()` holds."""
        ends = time.monotonic() + patience
        while not until():
            assert time.monotonic() < ends, "it did not come to that"
            try:
                self.posted.get(timeout=0.02)()
            except queue.Empty:
                continue

    def settle(self):
        self.turn(lambda: not self.lower.up and not self.lower.down and self.posted.empty())

    def put(self, i, shards=2):
        grants = []
        for shard in range(shards):
            item = ReserveItem(key(i), key(i - 1) if i > 1 else b"", shard, shards, SHARD, 256, b"tenant")
            (grant,) = self.store.reserve([item], "w", 1, time.monotonic())
            if grant.status != GRANTED:
                return grant.status
            self.arena[grant.offset : grant.offset + SHARD] = content(i, shard)
            grants.append(CommitItem(grant.reservation, kernels.digest(content(i, shard))))
        self.store.commit(grants, 1)
        if self.tier.faults._answering.is_set():
            self.settle()
        return GRANTED

    def lookup(self, *ids):
        """(tiers of what was found, after checking every byte; how many are loading)."""
        keys = [key(i) for i in ids]
        lease, found, _ = self.store.lookup(keys, 9, time.monotonic())
        for i, f in zip(ids, found, strict=False):
            for shard in range(len(f.digests)):
                start = f.offset + shard * f.stride
                assert (self.arena[start : start + f.shard_bytes] == content(i, shard)).all()
        if lease:
            self.store.release(lease, 9)
        return [f.tier for f in found], self.tiering.loading(keys[len(found) :], time.monotonic())

    def fetch(self, *ids):
        """Asks until nothing is on its way any more."""
        found, loading = self.lookup(*ids)
        while loading:
            self.settle()
            found, loading = self.lookup(*ids)
        return found

    def forget(self):
        """DRAM is emptied, the tier is not."""
        self.settle()
        self.store.clear()
        self.arena[:] = 0

    def value(self, name, *labels):
        return self.metrics[name].labels(*labels)._value.get()


@pytest.fixture
def world():
    made = []

    def make(*args, **rules):
        made.append(World(*args, **rules))
        return made[-1]

    yield make
    for w in made:
        w.tier.faults.resume()
        w.tiering.close(5.0)


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


def test_an_unknown_write_policy_is_refused_with_the_known_ones(world):
    with pytest.raises(ValueError, match="write-through, on-evict, selective"):
        world(write="sometimes")


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

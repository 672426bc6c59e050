"""Pins: what is pinned stays, within quotas and for its time."""

import pytest
from prometheus_client import CollectorRegistry

from pdserve.metrics.cache import CACHE
from pdserve.metrics.metric import build
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.eviction import LeafFirstLru
from pdserve.transfer.pins import Pins
from pdserve.transfer.store import Store
from pdserve.transfer.wire import GRANTED, CommitItem, ReserveItem


def key(i):
    return i.to_bytes(32, "little")


@pytest.fixture
def world():
    store = Store(100 * PAGE, LeafFirstLru(), build(CACHE, CollectorRegistry()))
    return store, Pins(store)


def put(store, i, parent=0, tag=b"a", pages=1):
    item = ReserveItem(key(i), key(parent) if parent else b"", 0, 1, pages * PAGE, 256, tag)
    (g,) = store.reserve([item], "w", 1, 0.0)
    if g.status == GRANTED:
        store.commit([CommitItem(g.reservation, i)], 1)
    return g.status


def visible(store, *ids):
    return [i for i in ids if (c := store.peek(key(i))) is not None and c.committed]


def test_a_pin_holds_the_whole_prefix_until_its_time_is_over(world):
    store, pins = world
    for i in (1, 2, 3):
        put(store, i, i - 1)
    assert pins.pin([key(3)], 60.0, 0.0) == (3, 0, "")
    for i in range(100, 300):
        assert put(store, i) == GRANTED
    assert visible(store, 1, 2, 3) == [1, 2, 3]
    pins.expire(59.0)
    assert pins.total == 3 * PAGE
    pins.expire(61.0)
    assert (pins.total, len(pins)) == (0, 0)
    for i in range(300, 400):
        put(store, i)
    assert visible(store, 1, 2, 3) == []


def test_a_tenant_has_a_quota_and_so_have_all_together(world):
    store, pins = world
    for n in range(6):
        for i in range(15):
            put(store, 100 * n + i + 1, 0, bytes([n]))
    for n in range(6):
        pinned, refused, why = pins.pin([key(100 * n + i + 1) for i in range(15)], 60.0, 0.0)
        if n < 5:
            assert (pinned, refused, why) == (10, 5, "over the quota")
        else:
            assert (pinned, refused) == (0, 15)
    assert pins.total == 50 * PAGE
    assert put(store, 9999, pages=5) == GRANTED  # half of the cache is always free to move
    assert pins.unpin([key(1), key(9999)]) == 1
    assert pins.total == 49 * PAGE


def test_a_pinned_chunk_that_is_dropped_goes_and_gives_its_space_back(world):
    store, pins = world
    put(store, 1)
    pins.pin([key(1)], 60.0, 0.0)
    store.clear()
    assert (store.stats()["used_bytes"], pins.total, len(pins)) == (0, 0, 0)
    pins.expire(1000.0)
    assert put(store, 1) == GRANTED


def test_pinning_again_lengthens_and_what_is_not_there_is_refused(world):
    store, pins = world
    put(store, 1)
    pins.pin([key(1)], 60.0, 0.0)
    pins.pin([key(1)], 60.0, 50.0)
    pins.expire(100.0)
    assert pins.total == PAGE
    assert pins.pin([key(7)], 1.0, 0.0) == (0, 1, "not in memory")

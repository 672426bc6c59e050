import gc
import weakref

import pytest
from prometheus_client import CollectorRegistry

from pdserve.metrics.cache import CACHE
from pdserve.metrics.metric import build
from pdserve.transfer import wire
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.collector import LONGEST_S, QUIET_S, Collector
from pdserve.transfer.eviction import POLICIES
from pdserve.transfer.gone import Gone
from pdserve.transfer.store import Store


@pytest.fixture
def collector():
    before = gc.get_threshold()
    yield Collector(100.0)
    gc.unfreeze()
    gc.set_threshold(*before)


class Cycle:
    def __init__(self) -> None:
        self.me = self


def test_everything_is_collected_once_it_is_quiet(collector):
    thing = weakref.ref(Cycle())
    assert not collector.tick(101.0, 5)
    assert not collector.tick(101.0 + QUIET_S / 2, 5)
    assert not collector.tick(101.0 + QUIET_S, 6)
    assert collector.tick(101.0 + 2 * QUIET_S, 6)
    assert thing() is None
    assert not collector.tick(101.0 + 9 * QUIET_S, 6)  # nothing has happened since


def test_who_is_never_quiet_is_collected_now_and_then(collector):
    done = [collector.tick(100.0 + i, i) for i in range(int(LONGEST_S) * 2 + 2)]
    assert done.count(True) == 2


def test_what_a_cache_has_most_of_is_not_the_collectors():
    gone = Gone()
    store = Store(200 * PAGE, POLICIES["lru"](), build(CACHE, CollectorRegistry()))
    store.on_forgotten.append(lambda chunk: gone.removed(chunk.key, "dram", "capacity", 1.0))
    names = [i.to_bytes(32, "little") for i in range(1, 401)]
    gc.collect()
    before = len(gc.get_objects())
    for name in names:  # one half takes the other one's place
        (grant,) = store.reserve([wire.ReserveItem(name, b"", 0, 1, PAGE, 256)], "w", 1, 0.0)
        store.commit([wire.CommitItem(grant.reservation, 7)], 1)
    gc.collect()
    assert (store.stats()["chunks"], len(gone)) == (200, 200)
    assert len(gc.get_objects()) - before < 1.5 * 200  # a list of digests for each

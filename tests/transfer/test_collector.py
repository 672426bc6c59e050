import gc
import weakref

import pytest

from pdserve.transfer.collector import LONGEST_S, QUIET_S, Collector


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

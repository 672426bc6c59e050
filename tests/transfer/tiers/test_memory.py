from contextlib import contextmanager

import pytest

from pdserve.transfer.tiers import conformance
from pdserve.transfer.tiers.base import TierError
from pdserve.transfer.tiers.conformance import Subject, make_chunk, soon
from pdserve.transfer.tiers.memory import MemoryTier


class Shared(MemoryTier):
    """The suite opens several tiers over one backend; a dictionary ends with its tier, so they share one."""

    def close(self):
        pass


class Memory(Subject):
    def __init__(self):
        self.tier = Shared()

    def open(self):
        return self.tier

    def break_put(self, tier, record, payload):
        tier.faults.break_next_put = True
        with pytest.raises(TierError):
            tier.put(record, payload, soon())

    def flip(self, record, position):
        self.tier.corrupt(record.key, position)

    @contextmanager
    def _stalled(self, tier):
        tier.faults.stall()
        yield
        tier.faults.resume()

    def stalled(self, tier):
        return self._stalled(tier)


@pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
def test_conformance(rule):
    rule(Memory())


def test_what_does_not_fit_is_refused_and_a_replacement_counts_once():
    tier = MemoryTier(capacity_bytes=1500)
    record, payload = make_chunk(1000)
    assert tier.put(record, payload, soon())
    assert tier.put(record, payload, soon())
    other, other_payload = make_chunk(1000)
    assert not tier.put(other, other_payload, soon())
    assert tier.stats()["used_bytes"] == 1000


def test_it_fails_as_often_as_it_is_told():
    tier = MemoryTier()
    tier.faults.fail_next = 2
    for _ in range(2):
        with pytest.raises(TierError):
            tier.contains([])
    assert tier.contains([]) == []

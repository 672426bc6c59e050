"""The breaker against what it promises, whatever happens in whatever order; and the tier around it."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from test_memory import Memory

from pdserve.transfer.tiers import conformance
from pdserve.transfer.tiers.base import CorruptChunk, TierError
from pdserve.transfer.tiers.breaker import CLOSED, HALF_OPEN, OPEN, Breaker, BreakerOptions, CircuitOpen, Guarded
from pdserve.transfer.tiers.conformance import make_chunk, soon
from pdserve.transfer.tiers.memory import MemoryTier

OPTIONS = BreakerOptions(failures=3, first_pause=1.0, longest_pause=8.0, probe_patience=5.0)


class Machine(RuleBasedStateMachine):
    """Calls begin, end or are never heard of again, in any order, while time passes."""

    def __init__(self):
        super().__init__()
        self.b = Breaker(OPTIONS)
        self.now = 0.0
        self.running = []  # (ticket, the state it was let through in)
        self.last_state = CLOSED
        self.opened_at = None
        self.probes = []  # when each that may still be out began

    @rule()
    def call(self):
        before = self.b.state(self.now)
        ticket = self.b.allow(self.now)
        if before == CLOSED:
            assert ticket is not None
        if before == OPEN:
            assert ticket is None
        if ticket is not None:
            self.running.append((ticket, before))
            if before == HALF_OPEN:
                # one probe at a time: another only when the first is overdue
                assert all(self.now - began >= OPTIONS.probe_patience for began in self.probes)
                self.probes.append(self.now)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), good=st.booleans())
    def end(self, data, good):
        ticket, state = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        before = self.b.state(self.now)
        if good:
            self.b.success(ticket)
        else:
            self.b.failure(ticket, self.now)
        after = self.b.state(self.now)
        if before != CLOSED and after == CLOSED:
            assert good
            assert state == HALF_OPEN  # nothing but a probe closes it
        if state == HALF_OPEN and (after == CLOSED or before == HALF_OPEN):
            self.probes.clear()
        if before == CLOSED and after == OPEN:
            assert not good

    @precondition(lambda self: self.running)
    @rule()
    def vanish(self):
        self.running.pop()

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 3.0, 10.0]))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def it_always_says_when_it_tries_again_and_then_does(self):
        wait = self.b.next_try(self.now)
        assert 0.0 <= wait <= max(OPTIONS.longest_pause, OPTIONS.probe_patience)
        assert (wait == 0.0) or self.b.state(self.now) != CLOSED


TestBreaker = Machine.TestCase
TestBreaker.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def failed(breaker, now, times):
    for _ in range(times):
        breaker.failure(breaker.allow(now), now)


def test_failures_in_a_row_open_it_and_a_success_between_starts_anew():
    b = Breaker(OPTIONS)
    failed(b, 0.0, 2)
    b.success(b.allow(0.0))
    failed(b, 0.0, 2)
    assert b.state(0.0) == CLOSED
    failed(b, 0.0, 1)
    assert (b.state(0.0), b.allow(0.99), b.next_try(0.25)) == (OPEN, None, 0.75)


def test_pauses_double_up_to_the_longest_and_start_small_after_a_good_probe():
    b = Breaker(OPTIONS)
    failed(b, 0.0, 3)
    now, pauses = 0.0, []
    for _ in range(5):
        pauses.append(b.next_try(now))
        now += pauses[-1]
        failed(b, now, 1)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0]
    now += 8.0
    b.success(b.allow(now))
    failed(b, now, 3)
    assert b.next_try(now) == 1.0


def test_what_began_before_the_failure_does_not_close_it():
    b = Breaker(OPTIONS)
    early = b.allow(0.0)
    failed(b, 0.0, 3)
    b.success(early)
    assert b.state(0.0) == OPEN
    probe = b.allow(1.0)
    b.success(early)
    assert b.state(1.0) == HALF_OPEN
    b.success(probe)
    assert b.state(1.0) == CLOSED


def test_a_probe_of_which_nothing_is_heard_does_not_close_the_door_for_ever():
    b = Breaker(OPTIONS)
    failed(b, 0.0, 3)
    assert b.allow(1.0) is not None
    assert b.allow(2.0) is None
    assert b.allow(6.0) is None  # overdue: that was a failure, and the pause after one
    assert b.allow(8.0) is not None


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=60))
def test_a_store_that_is_well_is_never_cut_off_for_longer_than_the_pause(outcomes):
    b, now = Breaker(OPTIONS), 0.0
    for good in outcomes:
        ticket = b.allow(now)
        if ticket is None:
            now += b.next_try(now)
            ticket = b.allow(now)
        if good:
            b.success(ticket)
        else:
            b.failure(ticket, now)
    now += b.next_try(now)
    b.success(b.allow(now))
    assert b.state(now) == CLOSED


# ---- around a tier ----


class GuardedMemory(Memory):
    def open(self):
        return Guarded(self.tier, options=BreakerOptions(failures=1000))

    def break_put(self, tier, record, payload):
        super().break_put(tier.tier if isinstance(tier, Guarded) else tier, record, payload)

    def stalled(self, tier):
        return super().stalled(tier.tier)


@pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
def test_conformance_of_a_guarded_tier(rule):
    rule(GuardedMemory())


def test_a_broken_tier_is_left_alone_and_tried_again():
    now = [100.0]
    memory = MemoryTier()
    guarded = Guarded(memory, options=OPTIONS, clock=lambda: now[0])
    memory.faults.fail_next = 3
    for _ in range(3):
        with pytest.raises(TierError, match="told to fail"):
            guarded.contains([bytes(32)])
    with pytest.raises(CircuitOpen, match=r"1\.0 s more after: memory: told to fail"):
        guarded.contains([bytes(32)])
    assert (guarded.stats()["circuit"], guarded.stats()["state"]) == ("open", "memory: told to fail")
    now[0] += 1.0
    assert guarded.contains([bytes(32)]) == [None]
    assert (guarded.stats()["circuit"], guarded.stats()["state"]) == ("closed", "ok")


def test_misses_and_corrupt_chunks_are_not_failures():
    class Liar(MemoryTier):
        def get(self, record, into, deadline):
            raise CorruptChunk("wrong bytes")

    guarded = Guarded(Liar(capacity_bytes=1), options=OPTIONS)
    record, payload = make_chunk(10)
    for _ in range(10):
        assert guarded.put(record, payload, soon()) is False
        with pytest.raises(CorruptChunk):
            guarded.get(record, payload, soon())
    assert guarded.stats()["circuit"] == "closed"


def test_the_tiers_own_bound_is_kept_when_the_caller_has_more_patience():
    memory = MemoryTier()
    guarded = Guarded(memory, get_timeout=0.05, put_timeout=0.05)
    record, payload = make_chunk(10)
    memory.faults.stall()
    for call in (guarded.get, guarded.put):
        started = time.monotonic()
        with pytest.raises(TierError, match="deadline"):
            call(record, payload, started + 300.0)


def test_a_bug_in_a_tier_gives_the_ticket_back():
    class Broken(MemoryTier):
        def contains(self, keys):
            raise ZeroDivisionError

    now = [0.0]
    guarded = Guarded(Broken(), options=OPTIONS, clock=lambda: now[0])
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            guarded.contains([])
    now[0] += 1.0
    with pytest.raises(ZeroDivisionError):  # the probe
        guarded.contains([])
    now[0] += 2.0
    with pytest.raises(ZeroDivisionError):  # and the next one
        guarded.contains([])

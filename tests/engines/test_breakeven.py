"""The fits and the decision, on made-up engines and stores whose true costs are known."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.engines.vllm.breakeven import ENOUGH, PROBE_EVERY, BreakEven, Line
from pdserve.engines.vllm.recent import BOUND, TTL_S, Recent


def line(base, slope, lengths):
    made = Line()
    for n in lengths:
        made.add(n, base + slope * n)
    return made


def engine(compute, load, lengths=(500, 1000, 4000, 9000)):
    b = BreakEven()
    b.computing, b.loading = line(*compute, lengths), line(*load, lengths)
    return b


@given(
    base=st.floats(0, 1),
    slope=st.floats(1e-7, 1e-2),
    lengths=st.lists(st.integers(16, 100_000), min_size=ENOUGH, max_size=30, unique=True),
)
def test_the_fit_finds_what_a_line_was_made_of(base, slope, lengths):
    made = line(base, slope, lengths)
    for n in lengths:
        assert made.at(n) == pytest.approx(base + slope * n, rel=1e-3, abs=1e-3 * (base + slope * max(lengths)))


def test_one_length_only_says_nothing_of_the_base():
    made = line(0.1, 0.001, [1000] * 5)
    assert made.at(1000) == pytest.approx(1.1)
    assert made.at(2000) == pytest.approx(2.2)


@given(st.lists(st.tuples(st.integers(1, 100_000), st.floats(0, 1e3)), min_size=1, max_size=40))
def test_nothing_that_is_measured_makes_a_time_negative(points):
    made = Line()
    for tokens, seconds in points:
        made.add(tokens, seconds)
    base, slope = made.fit()
    assert base >= 0
    assert slope >= 0


def test_what_changed_is_forgotten():
    made = line(0, 0.01, range(100, 2000, 100))
    for n in range(100, 10_000, 100):
        made.add(n, 0.001 * n)
    assert made.at(5000) == pytest.approx(5, rel=0.1)


def test_a_hit_is_loaded_until_both_sides_are_measured():
    b = BreakEven()
    assert b.choose(5000).reason == "unmeasured"
    b.computing = line(0, 0.001, [100, 200, 300])
    assert b.choose(5000).load


def test_the_shorter_way_is_taken_on_both_sides_of_the_break_even():
    b = engine(compute=(0, 1e-4), load=(0.05, 1e-5))  # equal at 0.05 / 9e-5 = 556 tokens
    assert b.choose(500).reason == "slower"
    assert b.choose(600).reason == "faster"


def test_a_slow_lower_tier_counts_only_for_what_lies_in_it():
    b = engine(compute=(0, 1e-4), load=(0, 1e-6))
    b.fetching = line(0, 1e-3, [100, 1000, 5000])
    assert b.choose(5000).load
    assert not b.choose(5000, to_fetch=4000).load
    assert b.choose(5000, to_fetch=256).load


def test_what_was_slower_is_tried_again_now_and_then():
    b = engine(compute=(0, 1e-6), load=(1, 0))
    reasons = [b.choose(5000).reason for _ in range(4 * PROBE_EVERY)]
    assert reasons.count("probe") == 4
    assert reasons.count("slower") == 4 * PROBE_EVERY - 4


def test_patience_is_what_computing_takes():
    b = engine(compute=(0, 1e-4), load=(0, 1e-6))
    assert b.patience(5000) == pytest.approx(0.5)
    assert BreakEven().patience(5000) is None
    assert b.saved(5000, 0.1) == pytest.approx(0.4)


def test_recent_remembers_for_a_while_and_not_across_a_clear():
    r = Recent()
    r.at_epoch(("d", 0))
    r.add(b"k", 10.0)
    assert r.has(b"k", 10.0 + TTL_S / 2)
    assert not r.has(b"k", 10.0 + TTL_S)
    r.at_epoch(("d", 0))
    assert r.has(b"k", 10.0)
    r.at_epoch(("d", 3))
    assert not r.has(b"k", 10.0)


def test_recent_is_bounded():
    r = Recent()
    for i in range(BOUND + 100):
        r.add(i.to_bytes(8, "little"), 0.0)
    assert len(r) == BOUND
    assert not r.has((0).to_bytes(8, "little"), 0.0)

from __future__ import annotations

import pytest

from pdserve.proxy.dashboard.figures import WINDOW, Recent, quantile, rate, rates


def test_a_rate_wants_two_looks() -> None:
    assert rate(30.0, 10.0, 2.0) == 10.0
    assert rate(None, 10.0, 2.0) is None
    assert rate(30.0, None, 2.0) is None
    assert rate(30.0, 10.0, 0.0) is None


def test_a_counter_that_fell_has_begun_anew() -> None:
    assert rate(4.0, 100.0, 2.0) == 2.0


def test_a_label_that_is_new_began_with_nothing() -> None:
    assert rates({"a": 4.0, "b": 6.0}, {"a": 2.0}, 2.0) == {"a": 1.0, "b": 3.0}
    assert rates({"a": 4.0}, None, 2.0) == {}


@pytest.mark.parametrize(
    ("q", "expected"),
    [(0.25, 0.5), (0.5, 1.0), (0.75, 1.5), (1.0, 2.0)],
    ids=["quarter", "half", "three quarters", "all"],
)
def test_quantiles_are_linear_within_a_bucket(q: float, expected: float) -> None:
    assert quantile(q, {"1.0": 10, "2.0": 20, "+Inf": 20}) == expected


def test_what_is_above_the_last_bound_is_that_bound() -> None:
    assert quantile(0.99, {"1.0": 1, "+Inf": 100}) == 1.0


def test_nothing_observed_has_no_quantile() -> None:
    assert quantile(0.5, {}) is None
    assert quantile(0.5, {"1.0": 0, "+Inf": 0}) is None


def test_only_the_last_seconds_count() -> None:
    recent = Recent()
    recent.add(0.0, {"1.0": 1000, "2.0": 1000, "+Inf": 1000})
    assert recent.quantile(0.5) is None, "what was there before says nothing of now"
    recent.add(2.0, {"1.0": 1000, "2.0": 1010, "+Inf": 1010})
    assert recent.quantile(0.5) == 1.5
    for step in range(2, 40):
        recent.add(step * 2.0, {"1.0": 1000, "2.0": 1010, "+Inf": 1010})
    assert step * 2.0 > WINDOW
    assert recent.quantile(0.5) is None


def test_a_histogram_that_began_anew_is_believed() -> None:
    recent = Recent()
    recent.add(0.0, {"1.0": 50, "+Inf": 50})
    recent.add(2.0, {"1.0": 5, "+Inf": 5})
    recent.add(4.0, {"1.0": 7, "+Inf": 7})
    assert recent.quantile(0.5) == 0.5

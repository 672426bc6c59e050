"""Which way is quicker: decisions over measurements that the test makes up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from pdserve.proxy import quicker
from pdserve.proxy.quicker import LOCAL, PROBE, Quicker

pytestmark = pytest.mark.anyio


@dataclass
class At:
    load: int = 0
    name: str = ""
    in_flight: int = 0
    host: str = ""


IDLE = [At()]


def learnt(split: float, local: float, sizes: tuple[int, ...] = (1000, 2000, 3000, 4000)) -> Quicker:
    """Seconds a thousand tokens, on either way."""
    found = Quicker()
    for size in sizes:
        found.add(False, size, split * size / 1000)
        found.add(True, size, local * size / 1000)
    return found


def test_producers_are_used_until_they_are_measured() -> None:
    fresh = Quicker()
    assert {fresh.why_not(1000, 1000, IDLE, IDLE) for _ in range(200)} == {""}


def test_the_other_way_is_tried_on_idle_consumers_only() -> None:
    found = Quicker()
    for size in (1000, 2000, 3000, 4000):
        found.add(False, size, 1.0)
    busy = [At(load=1)]
    assert {found.why_not(1000, 1000, IDLE, busy) for _ in range(20)} == {""}
    tried = [found.why_not(1000, 1000, IDLE, IDLE) for _ in range(2 * quicker.EXPLORE_EVERY)]
    assert tried.count(PROBE) == 2
    assert tried.count("") == len(tried) - 2


@pytest.mark.parametrize(
    ("split", "local", "expected"), [(1.0, 0.5, LOCAL), (1.0, 0.95, ""), (1.0, 1.0, ""), (0.5, 1.0, "")]
)
def test_the_clearly_sooner_way_is_taken(split: float, local: float, expected: str) -> None:
    assert learnt(split, local).why_not(2000, 2000, IDLE, IDLE) == expected


def test_what_a_consumer_has_cached_counts() -> None:
    found = learnt(1.0, 1.0)
    assert found.why_not(3000, 100, IDLE, IDLE) == LOCAL
    assert found.why_not(100, 3000, IDLE, IDLE) == ""


def test_running_answers_are_not_held_up() -> None:
    """Here 20 tokens take 10 ms and 2000 a second."""
    found, busy = learnt(1.0, 0.5), [At(load=3)]
    assert found.why_not(2000, 2000, IDLE, busy) == ""
    assert found.why_not(2000, 20, IDLE, busy) == LOCAL


def test_a_line_before_the_producers_counts() -> None:
    found = learnt(1.0, 1.0)
    assert found.why_not(2000, 2000, [At(load=1), At(load=4)], IDLE) == LOCAL


def test_now_and_then_the_other_way_is_measured_again() -> None:
    for found, usual, other in ((learnt(1.0, 0.5), LOCAL, ""), (learnt(0.5, 1.0), "", PROBE)):
        said = [found.why_not(2000, 2000, IDLE, IDLE) for _ in range(2 * quicker.PROBE_EVERY)]
        assert said.count(other) == 2
        assert said.count(usual) == len(said) - 2


def test_what_has_changed_is_learnt() -> None:
    found = learnt(1.0, 0.5)
    for _ in range(100):
        found.add(True, 2000, 9.0)
    assert found.why_not(2000, 2000, IDLE, IDLE) == ""


async def test_the_proxy_measures_both_ways(rig: Any) -> None:
    """A probe of the engine's load may see the last request a little longer, so a turn to try may go by unused."""
    async with rig(pd_adaptive=True) as r:
        tried = []
        for n in range(1, 81):
            reply = await r.complete(stream=True, prompt=f"{n} " + "word " * 300)
            route, reason = reply.headers["x-pdserve-route"], reply.headers.get("x-pdserve-reason", "")
            assert (route, reason) in {("pd", ""), ("local", PROBE)}
            tried += [n] if reason else []
            if len(tried) == 2:
                break
        assert len(tried) == 2
        assert tried[0] >= 2 * quicker.EXPLORE_EVERY  # after the producers' way was measured
        assert not any(n % quicker.EXPLORE_EVERY for n in tried)
        assert r.value("pdserve_split_decisions_total", decision=PROBE) == 2


async def test_without_the_option_nothing_is_measured(rig: Any) -> None:
    async with rig() as r:
        for n in range(12):
            assert (await r.complete(stream=True, prompt=f"{n} word")).headers["x-pdserve-route"] == "pd"

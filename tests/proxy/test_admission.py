from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pdserve.proxy.admission import Admission, Refused
from pdserve.proxy.keys import ANYBODY, Key

pytestmark = pytest.mark.anyio


class Line:
    """Requests of several keys before one gate, and the order in which they were let in."""

    def __init__(self, **options: Any) -> None:
        self.gate = Admission(**options)
        self.order: list[str] = []
        self.refused: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    def ask(self, name: str, key: Key, priority: int = 0, seconds: float = 0.0) -> None:
        self.tasks.append(asyncio.create_task(self._one(name, key, priority, seconds)))

    async def _one(self, name: str, key: Key, priority: int, seconds: float) -> None:
        try:
            async with self.gate.entered(key, priority) as leave:
                self.order.append(name)
                await asyncio.sleep(seconds)
                leave.first_token()
        except Refused:
            self.refused.append(name)

    async def done(self) -> None:
        await asyncio.gather(*self.tasks)
        assert (self.gate.inside, self.gate.waiting) == (0, 0)


async def fill(line: Line, seconds: float = 0.05) -> None:
    """Takes every place at the gate for a while."""
    for n in range(int(line.gate.limit)):
        line.ask(f"fill-{n}", Key("filler"), seconds=seconds)
    await asyncio.sleep(0)
    assert line.gate.inside == int(line.gate.limit)


async def test_without_a_target_there_is_no_gate() -> None:
    assert not Admission().gated(Key(ANYBODY))
    assert Admission().gated(Key("fast", ttft=0.5))


async def test_priority_first_and_in_order_within_it() -> None:
    line, key = Line(target=10.0), Key("a")
    line.gate.limit = 1
    await fill(line)
    for n, priority in enumerate((5, 0, 5, -1)):
        line.ask(f"r{n}", key, priority)
    await line.done()
    assert line.order[1:] == ["r3", "r1", "r0", "r2"]


async def test_tenants_share_by_weight_however_many_each_sends() -> None:
    line = Line(target=60.0, line_limit=1000)
    line.gate.limit = 1
    await fill(line)
    for n in range(60):
        line.ask(f"greedy-{n}", Key("greedy"))
    for n in range(10):
        line.ask(f"small-{n}", Key("small"))
        line.ask(f"heavy-{n}", Key("heavy", weight=2))
    await asyncio.sleep(0)
    await line.done()
    early = [name.split("-")[0] for name in line.order[1:21]]
    assert 4 <= early.count("small") <= 6
    assert 8 <= early.count("heavy") <= 11
    assert early.count("greedy") <= 6


async def test_a_full_line_and_a_late_place_are_refused() -> None:
    line = Line(target=0.4, line_limit=2)
    line.gate.limit = 1
    await fill(line, seconds=0.6)
    for n in range(4):
        line.ask(f"r{n}", Key("a"))
    await asyncio.sleep(0.01)
    assert line.refused == ["r2", "r3"]
    await line.done()
    assert sorted(line.refused) == ["r0", "r1", "r2", "r3"]


async def test_one_that_cannot_make_it_is_told_at_once_and_when_to_come_back() -> None:
    gate = Admission(target=1.0)
    gate.limit, gate.inside, gate._time = 2.0, 2, 5.0
    with pytest.raises(Refused) as refused:
        async with gate.entered(Key("a"), 0):
            pass
    assert refused.value.status == 429
    assert refused.value.retry_after >= 5


async def test_the_limit_follows_what_is_measured() -> None:
    slow, quick = Line(target=0.01), Line(target=30.0)
    before = slow.gate.limit
    await fill(slow, seconds=0.03)
    await slow.done()
    assert slow.gate.limit == before * 0.8
    for _ in range(6):
        await fill(quick, seconds=0.001)
        await quick.done()
    assert quick.gate.limit > before


async def test_who_leaves_the_line_leaves_nothing_behind() -> None:
    line = Line(target=10.0)
    line.gate.limit = 1
    await fill(line, seconds=0.05)
    for n in range(5):
        line.ask(f"r{n}", Key("a"))
    await asyncio.sleep(0)
    for task in line.tasks[2:5]:
        task.cancel()
    await asyncio.gather(*line.tasks, return_exceptions=True)
    assert (line.gate.inside, line.gate.waiting) == (0, 0)
    assert line.order == ["fill-0", "r0", "r4"]


async def test_through_the_proxy(rig: Any) -> None:
    async with rig(slo_ttft=0.3, max_waiting=4, engine={"delay": 0.1}) as r:
        replies = await asyncio.gather(*(r.complete(stream=n % 2 == 0) for n in range(40)))
        statuses = [reply.status for reply in replies]
        assert set(statuses) == {200, 429}
        refused = next(reply for reply in replies if reply.status == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert r.value("pdserve_requests_refused_total", reason="slo_cannot_be_met") == statuses.count(429)
        assert r.value("pdserve_admission_waiting") == 0
        assert (await r.complete()).status == 200

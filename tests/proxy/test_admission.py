from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from pdserve.proxy.admission import Admission, Refused
from pdserve.proxy.keys import Key
from pdserve.proxy.slo import SloClass

pytestmark = pytest.mark.anyio


class Line:
    """Requests of several keys before one gate, and the order in which they were let in."""

    def __init__(self, target: float, **options: Any) -> None:
        self.slo = SloClass(ttft=target)
        self.gate = Admission(**options)
        self.order: list[str] = []
        self.refused: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    def ask(self, name: str, key: Key, priority: int = 0, seconds: float = 0.0) -> None:
        self.tasks.append(asyncio.create_task(self._one(name, key, priority, seconds)))

    async def _one(self, name: str, key: Key, priority: int, seconds: float) -> None:
        try:
            async with self.gate.entered(key, self.slo, 1000, priority) as leave:
                self.order.append(name)
                await asyncio.sleep(seconds)
                leave.first_token()
        except Refused:
            self.refused.append(name)

    async def done(self) -> None:
        await asyncio.gather(*self.tasks)
        assert at_rest(self.gate)


async def fill(line: Line, seconds: float = 0.05) -> None:
    """Takes every place at the gate for a while."""
    for n in range(int(line.gate.first.most)):
        line.ask(f"fill-{n}", Key("filler"), seconds=seconds)
    await asyncio.sleep(0)
    assert line.gate.first.inside == int(line.gate.first.most)


def at_rest(gate: Admission) -> bool:
    return (gate.first.inside, gate.running.inside, gate.waiting) == (0, 0, 0)


async def test_without_a_target_there_is_no_gate(rig: Any) -> None:
    async with rig(slo_classes=("fast:ttft=0.5",)) as r:
        assert (await r.complete()).status == 200
        assert not r.value("pdserve_admission_limit")
        assert (await r.complete(stream=True)).status == 200


async def test_priority_first_and_in_order_within_it() -> None:
    line, key = Line(target=10.0), Key("a")
    line.gate.first.most = 1
    await fill(line)
    for n, priority in enumerate((5, 0, 5, -1)):
        line.ask(f"r{n}", key, priority)
    await line.done()
    assert line.order[1:] == ["r3", "r1", "r0", "r2"]


async def test_tenants_share_by_weight_however_many_each_sends() -> None:
    line = Line(target=60.0, line_limit=1000)
    line.gate.first.most = 1
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
    line.gate.first.most = 1
    await fill(line, seconds=0.6)
    for n in range(4):
        line.ask(f"r{n}", Key("a"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert line.refused == ["r2", "r3"]
    await line.done()
    assert sorted(line.refused) == ["r0", "r1", "r2", "r3"]


async def test_one_that_cannot_make_it_is_told_at_once_and_when_to_come_back() -> None:
    gate = Admission()
    gate.first.most, gate.first.inside = 2.0, 2
    gate.pace.add(1000, 5.0)
    with pytest.raises(Refused) as refused:
        async with gate.entered(Key("a"), SloClass(ttft=1.0), 1000):
            pass
    assert refused.value.status == 429
    assert refused.value.retry_after >= 5


async def test_a_long_prompt_is_known_to_take_longer() -> None:
    gate = Admission()
    for n in range(200):
        gate.pace.add(1000 * (n % 10), 0.1 + 0.2 * (n % 10))
    assert gate.predicted(0, 9000) == pytest.approx(1.9, rel=0.05)
    assert gate.predicted(0, 0) == pytest.approx(0.1, abs=0.05)
    gate.first.most, gate.first.inside = 1.0, 1
    with pytest.raises(Refused):
        async with gate.entered(Key("a"), SloClass(ttft=2.5), 9000):
            pass


async def test_the_limit_follows_what_is_measured() -> None:
    slow, quick = Line(target=0.01), Line(target=30.0)
    before = slow.gate.first.most
    await fill(slow, seconds=0.03)
    await slow.done()
    assert slow.gate.first.most == before * 0.8
    for _ in range(6):
        await fill(quick, seconds=0.001)
        await quick.done()
    assert quick.gate.first.most > before


async def test_streams_are_limited_when_tokens_come_too_slowly() -> None:
    gate, slo = Admission(), SloClass(itl=0.001)
    async with contextlib.AsyncExitStack() as stack:
        passes = [await stack.enter_async_context(gate.entered(Key("a"), slo, 10)) for _ in range(8)]
        for leave in passes:
            leave.first_token()
        for _ in range(32):
            passes[0].gap(0.05)
        assert gate.running.most == 0.8 * 8
        assert gate.running.full
        waiting = asyncio.create_task(stack.enter_async_context(gate.entered(Key("a"), slo, 10)))
        await asyncio.sleep(0.01)
        assert gate.waiting == 1
        for _ in range(32 * 50):
            passes[0].gap(0.0001)  # and grow again when they come in time
        assert (await asyncio.wait_for(waiting, 60)) is not None
    assert at_rest(gate)


async def test_who_leaves_the_line_leaves_nothing_behind() -> None:
    line = Line(target=10.0)
    line.gate.first.most = 1
    await fill(line, seconds=0.05)
    for n in range(5):
        line.ask(f"r{n}", Key("a"))
    await asyncio.sleep(0)
    for task in line.tasks[2:5]:
        task.cancel()
    await asyncio.gather(*line.tasks, return_exceptions=True)
    assert at_rest(line.gate)
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


async def test_classes_through_the_proxy(rig: Any) -> None:
    """A class with a hopeless target is refused while its engine is busy; the others pass."""
    classes = ("fast:ttft=0.05,itl=0.001", "batch:priority=10")
    async with rig(slo_classes=classes, engine={"delay": 0.1, "gap": 0.01}) as r:
        body = {"model": "fake", "prompt": "a", "stream": True, "max_tokens": 70}
        fast = [r.post("/v1/completions", body, X_Pdserve_Class="fast") for _ in range(30)]
        others = [r.post("/v1/completions", body) for _ in range(3)]
        others.append(r.post("/v1/completions", {**body, "priority": 20}))
        replies = await asyncio.gather(*fast, *others)
        assert {reply.status for reply in replies[30:]} == {200}
        assert 429 in {reply.status for reply in replies[:30]}
        named = {"class": "fast"}
        assert r.value("pdserve_slo_total", **named, target="ttft", outcome="missed") >= 8
        assert r.value("pdserve_slo_total", **named, target="ttft", outcome="refused") >= 1
        assert r.value("pdserve_slo_total", **named, target="itl", outcome="missed") >= 1
        assert r.value("pdserve_admission_streams_limit") < 4096
        unknown = await r.post("/v1/completions", body, X_Pdserve_Class="slow")
        assert (unknown.status, unknown.json()["error"]["code"]) == (400, "unknown_class")


async def test_who_gives_up_behind_others_leaves_the_line() -> None:
    """They never come to the front as long as somebody of a better priority waits."""
    line = Line(target=100.0)
    await fill(line, seconds=30)
    first, later = Key("one"), Key("one")
    line.ask("first", first, priority=-1)
    await asyncio.sleep(0)
    for n in range(20):
        line.ask(f"later-{n}", later)
        await asyncio.sleep(0)
        line.tasks.pop().cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert line.gate.waiting == 1
    assert [len(tenant.line) for tenant in line.gate._tenants.values() if tenant.line] == [1]
    for task in line.tasks:
        task.cancel()
    await asyncio.gather(*line.tasks, return_exceptions=True)
    assert at_rest(line.gate)

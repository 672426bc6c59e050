from __future__ import annotations

import asyncio

import pytest

from pdserve.proxy.watch import Watch

pytestmark = pytest.mark.anyio


class Wait:
    """Ends when it is overdue, or goes on until the next of `times`."""

    def __init__(self, *times: float) -> None:
        self.times = list(times)
        self.over = asyncio.Event()
        self.asked_at: list[float] = []

    def overdue(self, now: float) -> float | None:
        self.asked_at.append(now)
        if self.times:
            return self.times.pop(0)
        self.over.set()
        return None


async def test_each_ends_at_its_own_time_and_not_before() -> None:
    loop = asyncio.get_running_loop()
    watch, began = Watch(loop), loop.time()
    waits = {0.06: Wait(), 0.02: Wait(), 0.04: Wait()}
    for seconds, wait in waits.items():
        watch.add(wait, began + seconds)
    async with asyncio.timeout(30):
        await asyncio.gather(*(wait.over.wait() for wait in waits.values()))
    for seconds, wait in waits.items():
        assert wait.asked_at[0] >= began + seconds
    assert len(watch) == 0


async def test_what_has_ended_is_not_asked() -> None:
    loop = asyncio.get_running_loop()
    watch, gone, stays = Watch(loop), Wait(), Wait()
    watch.add(gone, loop.time() + 0.01)
    watch.add(stays, loop.time() + 0.03)
    watch.remove(gone)
    async with asyncio.timeout(30):
        await stays.over.wait()
    assert gone.asked_at == []


async def test_one_that_may_go_on_is_asked_again() -> None:
    loop = asyncio.get_running_loop()
    watch = Watch(loop)
    later = loop.time() + 0.03
    wait = Wait(later)
    watch.add(wait, loop.time() + 0.01)
    async with asyncio.timeout(30):
        await wait.over.wait()
    assert len(wait.asked_at) == 2
    assert wait.asked_at[1] >= later


async def test_many_waits_that_end_well_make_no_timers() -> None:
    class Counting:
        def __init__(self) -> None:
            self.timers = 0

        def call_at(self, at: float, callback: object) -> asyncio.TimerHandle:
            self.timers += 1
            return asyncio.get_running_loop().call_later(3600, lambda: None)

    loop = Counting()
    watch = Watch(loop)  # type: ignore[arg-type]
    for n in range(100):
        wait = Wait()
        watch.add(wait, 1000.0 + n)
        watch.remove(wait)
    assert loop.timers == 1

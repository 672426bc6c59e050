from __future__ import annotations

from typing import Any

import pytest

from pdserve.engines.fake.server import Fault
from pdserve.proxy.budget import MOST, Budget


def test_a_dead_engine_costs_nothing_and_a_struggling_one_does() -> None:
    budget = Budget()
    assert all(budget.spend(reason) for reason in ("connect", "broken") for _ in range(100))
    assert [budget.spend("status") for _ in range(12)] == [True] * 10 + [False] * 2
    for _ in range(5):
        budget.earn()
    assert [budget.spend("timeout"), budget.spend("timeout")] == [True, False]
    for _ in range(1000):
        budget.earn()
    assert budget.left == MOST


@pytest.mark.anyio
async def test_an_overload_is_not_doubled(rig: Any) -> None:
    async with rig(producers=2, consumers=1) as r:
        for producer in r.producers:
            producer.always = Fault("status", status=503)
        replies = [await r.complete() for _ in range(60)]
        asked = sum(len(producer.seen) for producer in r.producers)
        assert 60 <= asked <= 60 + 10 + 60 * 0.2 + 1
        assert {reply.status for reply in replies} == {200, 503}
        assert all("retry-after" in reply.headers for reply in replies if reply.status == 503)

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any

import pytest

from pdserve.engines.fake.server import Fault

pytestmark = pytest.mark.anyio

KINDS = ("status", "plain", "reset", "cut", "early", "torn", "garbage", "rubbish", "stall", "mute")


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("seed", range(3))
async def test_whatever_goes_wrong_every_request_ends_once_and_in_order(
    rig: Any, quick: Any, seed: int, early: bool
) -> None:
    """Engines fail in every way at random, clients leave at random; the rest get a well-formed answer each."""
    chance = random.Random(seed)
    deadlines = quick(prefill=0.5, answer=1, event=0.5, resume=0.5)
    async with rig(producers=2, consumers=2, engine={"gap": 0.001}, deadlines=deadlines, early_decode=early, early_token=early) as r:
        for engine in r.producers + r.consumers:
            picks = [chance.choice(KINDS) if chance.random() < 0.3 else "" for _ in range(400)]
            made = (Fault(k, status=chance.choice([500, 503, 429, 400]), after=chance.randint(0, 3)) for k in picks)
            engine.faults.extend(fault if fault.kind else None for fault in made)
        ends: Counter[str] = Counter()

        async def stays(n: int) -> None:
            stream = n % 2 == 0
            reply = await r.complete(prompt=f"p {n}", stream=stream, max_tokens=5)
            assert reply.headers["x-request-id"]
            if reply.status != 200:
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
                ends["error"] += 1
            elif reply.headers["content-type"].startswith("text/event-stream"):
                events = reply.events()
                assert events[-1] == "[DONE]"
                ends["broken off" if "error" in events[-2] else "done"] += 1
            else:
                assert len(reply.json()["choices"]) == 1
                ends["done"] += 1

        async def leaves(n: int) -> None:
            _, writer = await r.open(
                "/v1/chat/completions", {"messages": [{"content": f"q {n}"}], "stream": n % 3 == 0}
            )
            await asyncio.sleep(chance.random() * 0.1)
            writer.transport.abort()

        limit = asyncio.Semaphore(24)

        async def one(n: int) -> None:
            async with limit:
                await (leaves(n) if n % 4 == 3 else stays(n))

        await asyncio.gather(*(one(n) for n in range(160)))
        await r.settled()
        assert sum(ends.values()) == 120
        assert ends["done"] > 0
        counted = [
            sample.value
            for family in r.app.state.registry.collect()
            for sample in family.samples
            if sample.name == "pdserve_requests_total" and sample.labels["endpoint"] == "/v1/completions"
        ]
        assert sum(counted) == 120
        for engine in r.producers + r.consumers:
            engine.faults.clear()
        assert (await r.complete()).status == 200
        assert json.loads((await r.get("/v1/models")).body)["data"]

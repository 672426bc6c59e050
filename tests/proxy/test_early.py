"""The decode leg that is sent while the prefill still runs: it is the one that answers, and it never outlives its use."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pdserve.engines.fake.server import Fault

pytestmark = pytest.mark.anyio


async def test_the_consumer_is_asked_before_the_producer_has_answered_and_once_only(
    rig: Any, until: Any, hold: Any
) -> None:
    async with rig(early_decode=True) as r:
        go = hold(r.p)
        asked = asyncio.create_task(r.complete(max_tokens=4, stream=True))
        await until(lambda: r.p.seen and r.d.seen)
        assert r.p.running == 1
        params = r.d.seen[0].body["kv_transfer_params"]
        assert params["do_remote_prefill"] is True
        assert params["pdserve.expect_s"] == 60  # what the prefill may take
        go.set()
        reply = await asked
        assert reply.headers["x-pdserve-route"] == "pd"
        assert reply.headers["x-pdserve-decode"] == "decode-0"
        assert reply.events()[-1] == "[DONE]"
        assert len(r.d.seen) == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_the_answer_is_that_without_it(rig: Any, stream: bool, path: str) -> None:
    body = {"model": "fake", "prompt": "one two", "messages": [{"role": "user", "content": "one two"}], "max_tokens": 5}
    async with rig(early_decode=True, consumers=2) as early, rig(consumers=2) as plain:
        one, two = [await r.post(path, body | {"stream": stream}) for r in (early, plain)]
        assert one.status == two.status == 200
        if stream:
            assert [e["choices"] for e in one.events()[:-1]] == [e["choices"] for e in two.events()[:-1]]
        else:
            assert one.json()["choices"] == two.json()["choices"]


async def test_when_the_producer_fails_the_waiting_leg_is_dropped_and_the_consumer_computes(rig: Any) -> None:
    async with rig(early_decode=True) as r:
        r.p.always = Fault("status", 500)
        r.d.delay = 0.05
        reply = await r.complete(max_tokens=3, stream=True)
        assert reply.status == 200
        assert (reply.headers["x-pdserve-route"], reply.headers["x-pdserve-reason"]) == ("local", "prefill-failed")
        waiting, ordinary = r.d.seen
        assert "pdserve.expect_s" in waiting.body["kv_transfer_params"]
        assert "kv_transfer_params" not in ordinary.body


async def test_the_clients_mistake_is_told_and_nothing_waits(rig: Any, until: Any) -> None:
    async with rig(early_decode=True) as r:
        r.p.always = Fault("status", 400)
        r.d.always = Fault("stall")
        reply = await r.complete()
        assert reply.status == 400
        await until(lambda: r.d.running == 0)


@pytest.mark.parametrize("kind", ["reset", "garbage"])
async def test_a_waiting_leg_that_breaks_is_made_good_on_another_consumer(rig: Any, kind: str) -> None:
    async with rig(early_decode=True, consumers=2) as r:
        r.p.delay = 0.05
        r.consumers[0].always = Fault(kind)
        replies = [await r.complete(max_tokens=3, stream=True) for _ in range(2)]
        assert [x.status for x in replies] == [200, 200]
        assert all(x.events()[-1] == "[DONE]" for x in replies)
        assert {x.headers["x-pdserve-decode"] for x in replies} == {"decode-1"}


async def test_an_engine_that_dies_after_it_began_is_taken_over_with_the_real_handover(rig: Any) -> None:
    async with rig(early_decode=True, consumers=2) as r:
        r.consumers[0].always = Fault("cut", after=0)
        for _ in range(2):
            reply = await r.complete(max_tokens=6, stream=True, temperature=0)
            assert reply.events()[-1] == "[DONE]"
        later = [s for d in r.consumers for s in d.seen if "pdserve.num_tokens" in str(s.body.get("kv_transfer_params"))]
        assert later
        assert all("pdserve.expect_s" not in s.body["kv_transfer_params"] for s in later)


async def test_a_client_that_leaves_during_the_prefill_leaves_nothing_behind(rig: Any, until: Any) -> None:
    async with rig(early_decode=True) as r:
        r.p.always = Fault("stall")
        _, writer = await r.open("/v1/completions", {"model": "fake", "prompt": "one two", "stream": True})
        await until(lambda: r.p.running == 1 and r.d.seen)
        writer.transport.abort()
        await until(lambda: r.p.running == 0 and r.d.running == 0)


async def test_the_load_of_consumers_counts_legs_that_wait(rig: Any, until: Any, hold: Any) -> None:
    async with rig(early_decode=True) as r:
        go = hold(r.p)
        asked = asyncio.create_task(r.complete())
        await until(lambda: r.d.seen)
        consumer = next(i for i in r.fleet.instances if i.role == "decode")
        assert consumer.in_flight == 1
        go.set()
        await asked


async def test_a_consumer_on_another_host_is_named_to_the_producer(rig: Any) -> None:
    async with rig() as r:
        for instance in r.fleet.instances:
            instance.place = "b" if instance.role == "decode" else "a"
        await r.complete()
        assert r.p.seen[0].body["kv_transfer_params"]["pdserve.push_to"] == "b"
        assert r.d.seen[0].body["kv_transfer_params"]["pdserve.source"] == "prefill-0"
        for instance in r.fleet.instances:
            instance.place = "a"
        await r.complete()
        assert "pdserve.push_to" not in r.p.seen[1].body["kv_transfer_params"]

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pdserve.engines.fake.server import FakeEngine, Fault

pytestmark = pytest.mark.anyio


async def test_an_instance_comes_back_by_itself(rig: Any, until: Any) -> None:
    async with rig(producers=0, consumers=2) as r:
        gauge = {"instance": "decode-0", "role": "decode"}
        assert r.value("pdserve_instance_up", **gauge) == 1
        await r.d.stop()
        await until(lambda: r.value("pdserve_instance_up", **gauge) == 0)
        assert {(await r.complete()).headers["x-pdserve-decode"] for _ in range(4)} == {"decode-1"}
        await r.d.start()
        await until(lambda: r.value("pdserve_instance_up", **gauge) == 1)
        assert {(await r.complete()).headers["x-pdserve-decode"] for _ in range(4)} == {"decode-0", "decode-1"}


async def test_health_follows_the_consumers(rig: Any, until: Any) -> None:
    async with rig(producers=1, consumers=1, both=1) as r:
        one, other = r.consumers
        assert (await r.get("/health")).status == 200
        one.healthy = False
        await until(lambda: len(r.fleet.consumers()) == 1)
        assert (await r.get("/health")).status == 200
        other.healthy = False
        await until(lambda: not r.fleet.consumers())
        assert (await r.get("/health")).status == 503
        assert (await r.get("/ping")).status == 200
        refused = await r.complete()
        assert (refused.status, refused.json()["error"]["message"]) == (503, "No engine that can answer is up.")
        assert not r.p.seen, "a producer must not work for a request that nobody can finish"
        one.healthy = True
        await until(lambda: r.fleet.ready)


async def test_one_late_probe_takes_nothing_down(rig: Any, until: Any) -> None:
    async with rig(producers=0, probe_every=600) as r:  # none but those that are made here
        instance = r.fleet.instances[0]
        r.d.healthy = False
        await r.fleet.probe(instance)
        assert instance.up
        r.d.healthy = True
        await r.fleet.probe(instance)
        assert (instance.up, instance.failures) == (True, 0)


async def test_models_are_learnt_from_the_engines(rig: Any) -> None:
    async with rig(engine={"model": "adapter"}, models=frozenset({"base"})) as r:
        assert r.fleet.models == {"adapter", "base"}
        assert (await r.complete(model="adapter")).status == 200
        assert (await r.complete(model="other")).status == 404


async def test_an_engine_that_starts_later_is_taken_in(rig: Any, until: Any) -> None:
    late = FakeEngine(name="decode-0")
    await late.start()
    await late.stop()
    async with rig(producers=0, consumers=0, instances=(("decode-0", "decode", late.url),)) as r:
        assert (await r.get("/health")).status == 503
        async with late:
            await until(lambda: r.fleet.ready)
            assert (await r.complete()).status == 200


async def test_in_flight_is_counted_and_least_load_uses_it(rig: Any, until: Any) -> None:
    async with rig(producers=0, consumers=2, decode_policy="least_load") as r:
        r.d.always = Fault("stall")
        _, writer = await r.open("/v1/completions", {"prompt": "a"})
        await until(lambda: r.fleet.instances[0].in_flight == 1)
        assert {(await r.complete()).headers["x-pdserve-decode"] for _ in range(4)} == {"decode-1"}
        writer.close()
        await until(lambda: r.fleet.instances[0].in_flight == 0)


async def test_an_engine_that_comes_back_is_on_trial_first(rig: Any, until: Any, hold: Any) -> None:
    async with rig(producers=0, consumers=2) as r:
        port = r.d.port
        await r.d.stop()
        await until(lambda: r.fleet.instances[0].state == "down")
        r.d.port = port
        await r.d.start()
        await until(lambda: r.fleet.instances[0].state == "trial")
        go = hold(r.d)  # the request on trial lasts until all others are through
        asked = [asyncio.create_task(r.complete()) for _ in range(12)]
        await until(lambda: sum(task.done() for task in asked) == 11)
        assert {task.result().headers["x-pdserve-decode"] for task in asked if task.done()} == {"decode-1"}
        go.set()
        names = [(await task).headers["x-pdserve-decode"] for task in asked]
        assert names.count("decode-0") == 1
        await until(lambda: r.fleet.instances[0].state == "up")


async def test_an_engine_that_fails_and_fails_has_to_rest(rig: Any) -> None:
    async with rig(consumers=2, probe_every=0.02) as r:
        r.d.always = Fault("reset")
        for _ in range(12):
            assert (await r.complete()).status == 200
        assert r.fleet.instances[1].state == "down"
        asked = len(r.d.seen)
        assert asked >= 5  # a reused connection that breaks off silently is tried once more
        for _ in range(6):
            assert (await r.complete()).headers["x-pdserve-decode"] == "decode-1"
        assert len(r.d.seen) == asked


async def test_the_last_one_never_rests(rig: Any) -> None:
    async with rig(probe_every=0.02) as r:
        r.d.always = Fault("reset")
        assert {(await r.complete()).status for _ in range(9)} == {502}
        r.d.always = None
        assert (await r.complete()).status == 200


async def test_the_load_that_others_make_counts(rig: Any, until: Any) -> None:
    async with rig(producers=0, consumers=2, decode_policy="least_load") as r:
        r.d.others = 7
        await until(lambda: r.fleet.instances[0].load == 7)
        assert {(await r.complete()).headers["x-pdserve-decode"] for _ in range(4)} == {"decode-1"}


async def test_a_session_stays_on_both_legs(rig: Any) -> None:
    async with rig(producers=3, consumers=3, prefill_policy="session", decode_policy="session") as r:
        found = {}
        for n in range(8):
            body = {"prompt": "a b", "session_id": f"body-{n}"}
            replies = [await r.post("/v1/completions", body, X_Session_ID=f"s-{n}") for _ in range(3)]
            legs = {(x.headers["x-pdserve-prefill"], x.headers["x-pdserve-decode"]) for x in replies}
            assert len(legs) == 1
            found[n] = legs.pop()
        assert len(set(found.values())) > 1


async def test_a_short_prompt_and_a_cached_one_are_not_split(rig: Any) -> None:
    async with rig(pd_min_tokens=200, engine={"max_model_len": 10**6}) as r:
        short = await r.complete(prompt="one two three")
        assert (short.headers["x-pdserve-route"], short.headers["x-pdserve-reason"]) == ("local", "short-prompt")
        long = "word " * 2000
        assert (await r.complete(prompt=long)).headers["x-pdserve-route"] == "pd"
        again = await r.complete(prompt=long + "and more")
        assert (again.headers["x-pdserve-route"], again.headers["x-pdserve-reason"]) == ("local", "mostly-cached")
        assert (await r.complete(prompt="other " * 2000)).headers["x-pdserve-route"] == "pd"
        assert r.value("pdserve_split_decisions_total", decision="mostly-cached") == 1


async def test_a_line_before_every_producer_is_gone_round(rig: Any, until: Any) -> None:
    async with rig(pd_max_queue=4) as r:
        r.p.others = 9
        await until(lambda: r.fleet.instances[0].load >= 4)
        reply = await r.complete()
        assert (reply.headers["x-pdserve-route"], reply.headers["x-pdserve-reason"]) == ("local", "producers-busy")

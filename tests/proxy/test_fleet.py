from __future__ import annotations

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
    async with rig(producers=0) as r:
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
    async with rig(producers=0, consumers=2, policy="least_load") as r:
        r.d.always = Fault("stall")
        _, writer = await r.open("/v1/completions", {"prompt": "a"})
        await until(lambda: r.fleet.instances[0].in_flight == 1)
        assert {(await r.complete()).headers["x-pdserve-decode"] for _ in range(4)} == {"decode-1"}
        writer.close()
        await until(lambda: r.fleet.instances[0].in_flight == 0)

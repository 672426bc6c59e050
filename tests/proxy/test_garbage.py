from __future__ import annotations

import asyncio
import gc
import types
from collections import Counter
from typing import Any

import pytest

from pdserve.engines.fake.server import Fault
from pdserve.errors import UpstreamError
from pdserve.proxy.exchange import Exchange
from pdserve.proxy.guard import Guarded
from pdserve.proxy.relay import Client
from pdserve.proxy.upstream import Upstream, _Connection

pytestmark = pytest.mark.anyio


def left(*kinds: type) -> list[Any]:
    # By type(): isinstance() asks some libraries' objects for their __class__, and they answer with a warning.
    return [found for found in gc.get_objects() if issubclass(type(found), kinds)]


async def test_a_request_leaves_nothing_for_the_collector(rig: Any, until: Any, uncollected: None) -> None:
    """What is in no circle goes at once; with circles each request, its body included, would stay until a collection."""
    before = left(Client, Exchange)  # other tests'
    async with rig() as r:
        for stream in (True, False) * 5:
            assert (await r.complete(stream=stream, max_tokens=3)).status == 200
        await r.settled()
        await until(lambda: not [found for found in left(Client, Exchange) if not any(found is b for b in before)])


async def test_a_connection_leaves_nothing_for_the_collector(rig: Any, until: Any, uncollected: None) -> None:
    async with rig(probe_every=30) as r:
        before = len(left(Guarded))
        for _ in range(5):
            reader, writer = await r.open("/v1/completions", {"model": "fake", "prompt": "a", "max_tokens": 1})
            assert b" 200 " in await asyncio.wait_for(reader.readline(), 30)
            writer.transport.abort()
        await until(lambda: len(left(Guarded)) <= before)
        r.d.gap = 30.0
        reader, writer = await r.open("/v1/completions", {"model": "fake", "prompt": "a", "max_tokens": 9, "stream": True})
        await asyncio.wait_for(reader.readline(), 30)
        writer.transport.abort()  # in mid-stream
        await r.settled()
        await until(lambda: len(left(Guarded)) <= before)


async def test_an_engine_connection_leaves_nothing_for_the_collector(rig: Any, until: Any, uncollected: None) -> None:
    async with rig(probe_every=30) as r:
        engine = Upstream("d", r.d.url)
        async with engine.request(b"GET", b"/version", [], b"", 5) as answer:
            await answer.read(1000)
        kept = len(left(_Connection))
        r.d.always = Fault("cut", after=1)
        async with engine.request(b"POST", b"/v1/completions", [], b'{"prompt":"a","stream":true}', 5) as answer:
            await answer.chunk(30)  # left in mid-stream, or broken off: it is closed
        del answer
        await engine.close()
        await until(lambda: len(left(_Connection)) < kept)


def circles() -> Counter[str]:
    """The proxy's own objects that only the collector found."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        kinds = [type(found) for found in gc.garbage]
        return Counter(
            kind.__qualname__ for kind in kinds if kind.__module__.startswith("pdserve.proxy") or issubclass(kind, UpstreamError)
        ) + Counter(
            found.f_code.co_qualname for found in gc.garbage
            if isinstance(found, types.FrameType) and str(found.f_globals.get("__name__")).startswith("pdserve.proxy")
        )  # fmt: skip
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


BROKEN = ("status", "plain", "reset", "cut", "early", "torn", "garbage", "rubbish", "confess")


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_failures_leave_nothing_for_the_collector(
    rig: Any, until: Any, leg: str, uncollected: None, unlogged: None
) -> None:
    """What fails has a traceback, which holds the frames it went through, which hold the request."""
    async with rig(probe_every=30, consumers=2 if leg == "decode" else 1) as r:
        engines = r.producers if leg == "prefill" else r.consumers
        assert (await r.complete(max_tokens=3)).status == 200
        await r.settled()
        circles()
        for kind in BROKEN:
            for stream in (True, False):
                for engine in engines:
                    engine.faults.extend([Fault(kind)] * 2)  # a connection that was kept is tried once more on a new one
                await r.complete(stream=stream, max_tokens=4, temperature=0)
                for engine in engines:
                    engine.faults.clear()
                for instance in r.fleet.instances:
                    instance.went_well()  # none is left out for having failed too often
        await r.settled()
        assert circles() == Counter()
        broken = [r.value("pdserve_leg_failures_total", instance=e.name, leg=leg, reason="broken") for e in engines]
        assert sum(broken) >= len(BROKEN)


async def test_an_early_leg_that_fails_leaves_nothing_for_the_collector(rig: Any, uncollected: None, unlogged: None) -> None:
    async with rig(probe_every=30, early_decode=True) as r:
        await r.complete(max_tokens=3)
        circles()
        for _ in range(3):
            r.d.faults.append(Fault("garbage"))
            await r.complete(stream=True, max_tokens=4)
        await r.settled()
        assert circles() == Counter()


@pytest.mark.parametrize("luck", [0, 7])
async def test_a_first_token_of_the_producers_leaves_nothing_for_the_collector(
    rig: Any, luck: int, uncollected: None, unlogged: None
) -> None:
    async with rig(probe_every=30, consumers=2, early_decode=True, early_token=True, slo_itl=5.0) as r:
        for consumer in r.consumers:
            consumer.luck = luck
        r.p.delay = 0.05  # an early leg has its connection by then
        await r.complete(max_tokens=3, stream=True)
        circles()
        for kind in ("", "cut", "garbage", "status", "early"):
            r.d.faults.append(Fault(kind, after=1) if kind else None)
            await r.complete(stream=True, max_tokens=4)
            await r.complete(stream=True, max_tokens=4, stop=" w")
        await r.settled()
        assert circles() == Counter()


async def test_a_body_that_is_refused_leaves_nothing_for_the_collector(rig: Any, uncollected: None) -> None:
    async with rig(probe_every=30, max_body=1000) as r:
        circles()
        for _ in range(3):
            assert (await r.complete(prompt="a" * 2000)).status == 413
        await r.settled()
        assert circles() == Counter()

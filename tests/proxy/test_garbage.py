from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest

from pdserve.engines.fake.server import Fault
from pdserve.proxy.guard import Guarded
from pdserve.proxy.relay import Client
from pdserve.proxy.split import Exchange
from pdserve.proxy.upstream import Upstream, _Connection

pytestmark = pytest.mark.anyio


@pytest.fixture
def uncollected() -> Iterator[None]:
    """What is in a circle stays, and can be seen."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


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

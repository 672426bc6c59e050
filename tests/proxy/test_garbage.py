from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import types
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from pdserve.engines.fake.server import Fault
from pdserve.errors import UpstreamError
from pdserve.proxy.exchange import Exchange
from pdserve.proxy.guard import Guarded
from pdserve.proxy.relay import Client
from pdserve.proxy.upstream import LegFailure, Upstream, _Connection

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


@pytest.fixture
def full() -> Iterator[str]:
    """A server that lets nobody in: its queue is full, so that a connection to it is neither made nor refused."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):
            guest = stack.enter_context(socket.socket())
            guest.setblocking(False)
            guest.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("how", ["left", "late", "refused"])
async def test_a_connection_that_is_not_made_leaves_nothing(full: str, how: str, until: Any, uncollected: None) -> None:
    """Left while it is being made, too late, or refused: its socket is closed, and no circle waits for the collector."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        refusing = f"http://127.0.0.1:{gone.getsockname()[1]}"
    engine = Upstream("d", refusing if how == "refused" else full)

    async def ask() -> None:
        with contextlib.suppress(LegFailure):
            async with engine.request(b"GET", b"/", [], b"", 0.05 if how == "late" else 60):
                pytest.fail("it was let in")

    async def give_up() -> None:
        asked = asyncio.create_task(ask())
        if how == "left":
            await until(lambda: engine.busy == 1)
            asked.cancel()
        await asyncio.wait([asked])

    await give_up()  # the loop keeps a descriptor of its own from the first one on
    await asyncio.sleep(0)
    files = open_files()
    circles()
    for _ in range(3):
        await give_up()
    await until(lambda: open_files() <= files)
    assert circles() == Counter()
    assert engine.busy == 0


async def test_a_connection_that_is_made_while_it_is_given_up_is_closed(
    monkeypatch: pytest.MonkeyPatch, until: Any, uncollected: None
) -> None:
    """Its protocol is not told by the loop that it is lost."""
    asked: list[asyncio.Task[None]] = []
    seen: list[bytes] = []
    connections: list[weakref.ref[_Connection]] = []
    made = _Connection.connection_made

    def given_up(self: _Connection, transport: Any) -> None:
        made(self, transport)
        connections.append(weakref.ref(self))
        asked[0].cancel()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read())
        writer.close()

    async def ask(engine: Upstream) -> None:
        async with engine.request(b"GET", b"/", [], b"", 60):
            pytest.fail("nobody answers")

    monkeypatch.setattr(_Connection, "connection_made", given_up)
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    engine = Upstream("d", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    asked.append(asyncio.create_task(ask(engine)))
    await asyncio.wait(asked)
    await until(lambda: seen == [b""])
    assert asked.pop().cancelled()
    assert engine.busy == 0
    await until(lambda: connections[0]() is None)
    server.close()
    await server.wait_closed()

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from pdserve.proxy.locating import Locating
from pdserve.proxy.policies import chunk_location
from pdserve.proxy.policies.base import Facts
from pdserve.proxy.policies.conformance import Dummy
from pdserve.proxy.routing import Routing

pytestmark = pytest.mark.anyio

FACTS = Facts("/v1/completions", 8192, blocks=(1, 2, 3, 4, 5, 6, 7, 8), request="r")
HERE = Dummy("d-0", host="127.0.0.1")


@pytest.fixture
async def daemon() -> AsyncIterator[Any]:
    """Answers POST /cache/held with what `told` says."""

    state = SimpleNamespace(told={"daemon_id": "a", "held": {}}, asked=[], url="")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int((head.lower() + b"content-length: 0\r\n").split(b"content-length: ")[1].split(b"\r\n")[0])
        if b"/cache/held" in head:
            state.asked.append(json.loads(await reader.readexactly(length)))
        raw = json.dumps(state.told).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    state.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield state
    server.close()
    await server.wait_closed()


def made(daemon: Any) -> tuple[Routing, Locating, chunk_location.Policy]:
    routing = Routing("chunk_location", "round_robin")
    policy = routing.prefill
    assert isinstance(policy, chunk_location.Policy)
    routing.learn(FACTS, HERE, 5, 2000)
    return routing, Locating(routing, (("cache", daemon.url),), "t"), policy


async def test_what_was_evicted_is_no_longer_believed(daemon: Any) -> None:
    _, locating, policy = made(daemon)
    assert policy.matched(FACTS, HERE) == (8, 8)
    daemon.told = {"daemon_id": "a", "held": {"r": [1000, 2000]}}
    await locating.ask()
    assert policy.matched(FACTS, HERE) == (8, 4)
    assert daemon.asked[-1] == {"ids": ["r"]}
    daemon.told = {"daemon_id": "a", "held": {"r": [2000, 2000]}}  # brought up again from below
    await locating.ask()
    assert policy.matched(FACTS, HERE) == (8, 8)
    await locating.stop()


async def test_a_daemon_that_begins_anew_has_nothing(daemon: Any) -> None:
    _, locating, policy = made(daemon)
    await locating.ask()
    assert policy.matched(FACTS, HERE) == (8, 8)
    daemon.told = {"daemon_id": "b", "held": {}}
    await locating.ask()
    assert policy.matched(FACTS, HERE) == (8, 0)
    await locating.stop()


async def test_a_daemon_that_does_not_answer_changes_nothing(daemon: Any) -> None:
    for told in ([], {"daemon_id": 5}):
        _, locating, policy = made(daemon)
        daemon.told = told
        await locating.ask()
        assert policy.matched(FACTS, HERE) == (8, 8)
        await locating.stop()
    _, locating, policy = made(SimpleNamespace(url="http://127.0.0.1:9"))
    await locating.ask()
    assert policy.matched(FACTS, HERE) == (8, 8)
    await locating.stop()


async def test_an_engine_that_begins_anew_has_nothing_but_its_host_does(rig: Any, until: Any) -> None:
    async with rig(both=1, producers=0, consumers=0, decode_policy="chunk_location") as r:
        prompt = "word " * 2000
        await r.complete(prompt=prompt)
        await r.complete(prompt=prompt)
        policy = r.app.state.routing.decode
        [facts] = list(r.app.state.routing.recent.values())[-1:]
        [instance] = r.fleet.instances
        assert policy.matched(facts, instance)[0] > 0
        await until(lambda: instance.born != b"")
        r.d.born += 100  # as if it had been started again between two probes
        await until(lambda: policy.matched(facts, instance)[0] == 0)
        assert policy.matched(facts, instance)[1] > 0


async def test_it_is_asked_only_where_it_matters(rig: Any, daemon: Any) -> None:
    async with rig(caches=(("cache", daemon.url),)) as r:
        assert not any(t.get_name() == "probe caches" for t in asyncio.all_tasks())
        assert (await r.complete()).status == 200
    async with rig(caches=(("cache", daemon.url),), prefill_policy="chunk_location"):
        assert any(t.get_name() == "probe caches" for t in asyncio.all_tasks())

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from prometheus_client import CollectorRegistry

from pdserve.metrics.metric import build
from pdserve.metrics.proxy import PROXY
from pdserve.proxy import locating as locating_
from pdserve.proxy.locating import Locating
from pdserve.proxy.policies import chunk_location
from pdserve.proxy.policies.base import Facts
from pdserve.proxy.policies.conformance import Dummy
from pdserve.proxy.routing import Routing
from pdserve.transfer.admin import make_app
from pdserve.transfer.held import Held

pytestmark = pytest.mark.anyio

FACTS = Facts("/v1/completions", 8192, blocks=(1, 2, 3, 4, 5, 6, 7, 8), request="r")
HERE = Dummy("d-0", host="127.0.0.1")


@pytest.fixture
async def daemon(until: Any, listening: Any) -> AsyncIterator[Any]:
    """Answers GET /cache/events with what `say` puts on the open connection; `asked` are the lives and numbers."""
    state = SimpleNamespace(asked=[], url="", writers=[], status=b"200 OK")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %b\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n:\n\n" % state.status)
        found = re.search(rb"GET /cache/events\?life=(\w*)&seq=(\d+)", head)
        state.writers.append(writer)
        state.asked.append((found[1].decode(), int(found[2])) if found else head)

    def say(kind: str, **fields: Any) -> None:
        state.writers[-1].write(f"event: {kind}\ndata: {json.dumps(fields)}\n\n".encode())

    async def cut() -> None:
        """Breaks the connection, and waits for the next one."""
        count = len(state.asked)
        state.writers[-1].close()
        await until(lambda: len(state.asked) > count)

    state.say, state.cut = say, cut
    async with listening(serve, state.writers) as state.url:
        yield state


@pytest.fixture
async def heard(daemon: Any, until: Any) -> AsyncIterator[Any]:
    """A policy that listens to the daemon: it believes that it has all eight blocks of FACTS. `heard.host()`: how many."""
    routing = Routing("chunk_location", "round_robin")
    policy = routing.prefill
    assert isinstance(policy, chunk_location.Policy)
    routing.learn(FACTS, HERE, 5, 2000)
    registry = CollectorRegistry()
    locating = Locating(routing, (("cache", daemon.url),), "t", build(PROXY, registry))
    await locating.start()
    await until(lambda: daemon.asked)

    def value(name: str) -> float:
        return registry.get_sample_value(name, {"cache": "cache"}) or 0.0

    yield SimpleNamespace(routing=routing, host=lambda: policy.matched(FACTS, HERE)[1], value=value)
    await locating.stop()


async def test_what_was_evicted_is_no_longer_believed(daemon: Any, heard: Any, until: Any) -> None:
    assert (heard.host(), daemon.asked) == (8, [("", 0)])
    daemon.say("all", daemon_id="a", seq=7, held={"r": [2000, 2000]})
    daemon.say("held", seq=8, request="r", tokens=1000, of=2000)
    await until(lambda: heard.host() == 4)
    daemon.say("held", seq=9, request="other", tokens=0, of=2000)
    daemon.say("held", seq=10, request="r", tokens=2000, of=2000)  # brought up again from below
    await until(lambda: heard.host() == 8)
    assert heard.value("pdserve_location_resyncs_total") == 1
    assert abs(heard.value("pdserve_location_heard_timestamp_seconds") - time.time()) < 600


async def test_a_lost_connection_goes_on_where_it_was(daemon: Any, heard: Any, until: Any) -> None:
    daemon.say("all", daemon_id="a", seq=7, held={"r": [2000, 2000]})
    daemon.say("held", seq=8, request="r", tokens=1000, of=2000)
    await until(lambda: heard.host() == 4)
    await daemon.cut()
    assert daemon.asked[-1] == ("a", 8)
    assert heard.host() == 4
    daemon.say("held", seq=9, request="r", tokens=500, of=2000)
    await until(lambda: heard.host() == 2)


async def test_a_daemon_that_begins_anew_has_nothing(daemon: Any, heard: Any, until: Any) -> None:
    daemon.say("all", daemon_id="a", seq=7, held={"r": [2000, 2000]})
    daemon.say("held", seq=8, request="r", tokens=1000, of=2000)
    await until(lambda: heard.host() == 4)
    await daemon.cut()
    daemon.say("all", daemon_id="b", seq=0, held={})
    await until(lambda: heard.host() == 0)


@pytest.mark.parametrize("event", [
    {"seq": 12, "request": "r", "tokens": 0, "of": 2000}, {"seq": "?"}, {"tokens": 5},
])  # fmt: skip
async def test_a_gap_or_nonsense_begins_the_connection_anew(daemon: Any, heard: Any, until: Any, event: dict[str, Any]) -> None:
    daemon.say("all", daemon_id="a", seq=7, held={"r": [1000, 2000]})
    await until(lambda: heard.host() == 4)
    daemon.say("held", **event)
    await until(lambda: len(daemon.asked) == 2)
    assert daemon.asked[1][0] == ""  # everything, please
    daemon.say("all", daemon_id="a", seq=12, held={"r": [500, 2000]})
    await until(lambda: heard.host() == 2)


async def test_a_daemon_that_has_fallen_silent_counts_as_empty(
    daemon: Any, heard: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.say("all", daemon_id="a", seq=7, held={"r": [1000, 2000]})
    await until(lambda: heard.host() == 4)
    monkeypatch.setattr(locating_, "GONE_S", -1.0)
    daemon.status = b"503 Busy"
    await daemon.cut()
    await until(lambda: heard.host() == 0)


async def test_what_was_told_before_the_reply_came_counts(daemon: Any, heard: Any, until: Any) -> None:
    daemon.say("all", daemon_id="a", seq=7, held={})
    daemon.say("held", seq=8, request="late", tokens=1000, of=2000)
    daemon.say("held", seq=9, request="r", tokens=500, of=2000)
    await until(lambda: heard.host() == 2)
    heard.routing.learn(dataclasses.replace(FACTS, request="late"), HERE, 5, 2000)
    assert heard.host() == 4


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


async def test_it_is_asked_only_where_it_matters(rig: Any, daemon: Any, until: Any) -> None:
    def listened() -> bool:
        return any(isinstance(asked, tuple) for asked in daemon.asked)

    async with rig(caches=(("cache", daemon.url),)) as r:
        assert (await r.complete()).status == 200
    assert not listened()
    async with rig(caches=(("cache", daemon.url),), prefill_policy="chunk_location"):
        await until(listened)


async def test_a_real_daemons_side_and_its_restart(until: Any) -> None:
    """The daemon's own route behind a real server; its memory of what is there is a set."""
    there: set[bytes] = set()
    daemon = SimpleNamespace(held=Held("a", there.__contains__))
    server = uvicorn.Server(uvicorn.Config(make_app(daemon, "secret"), log_level="warning", timeout_graceful_shutdown=1))  # type: ignore[arg-type]
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    routing = Routing("chunk_location", "round_robin")
    policy = routing.prefill
    assert isinstance(policy, chunk_location.Policy)
    with closing(socket.create_server(("127.0.0.1", 0))) as bound:
        serving = asyncio.create_task(server.serve([bound]))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        made = build(PROXY, CollectorRegistry())
        locating = Locating(routing, (("cache", url),), "secret", made)
        await locating.start()
        routing.learn(FACTS, HERE, 5, 2000)
        daemon.held.asked("r", [b"1", b"2", b"3", b"4"], 500, 2000)
        await until(lambda: policy.matched(FACTS, HERE)[1] == 0)
        for key, blocks in ((b"1", 2), (b"2", 4)):
            there.add(key)
            daemon.held.came(key)
            await until(lambda blocks=blocks: policy.matched(FACTS, HERE)[1] == blocks)
        before, daemon.held = daemon.held, Held("b", there.__contains__)
        before.close()  # what a daemon does when it ends
        await until(lambda: policy.matched(FACTS, HERE)[1] == 0)
        daemon.held.asked("r", [b"1", b"2", b"3", b"4"], 500, 2000)
        await until(lambda: policy.matched(FACTS, HERE)[1] == 4)
        daemon.held.close()
        await locating.stop()
        server.should_exit = True
        await serving

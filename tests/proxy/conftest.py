"""A real proxy under uvicorn and fake engines, all on loopback sockets in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
import uvicorn

from pdserve.engines.fake.server import FakeEngine
from pdserve.proxy import app as proxy_app
from pdserve.proxy.lifetime import Deadlines
from pdserve.proxy.options import Settings

#: Bounds that only a failing test meets. One that waits for a deadline to pass sets that one: see `quick`.
QUICK = Deadlines(
    receive=30, connect=20, prefill=60, answer=60, event=60, send=30, resume=60, probe=20, drain=20, shutdown=20
)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def rig() -> Callable[..., contextlib.AbstractAsyncContextManager[Rig]]:
    """`async with rig(producers=2) as r`: see _rig."""
    return _rig


@pytest.fixture
def until() -> Callable[..., Any]:
    return _until


@pytest.fixture
def listening() -> Callable[..., contextlib.AbstractAsyncContextManager[str]]:
    """`async with listening(serve, writers) as url`: see _listening."""
    return _listening


@pytest.fixture
def hold() -> Callable[[FakeEngine], asyncio.Event]:
    """hold(engine): from now on its requests wait for the event that this returns."""

    def made(engine: FakeEngine) -> asyncio.Event:
        go, answer = asyncio.Event(), engine.answer

        async def held(seen: Any, out: Any) -> None:
            if seen.method != "GET":
                await go.wait()
            await answer(seen, out)

        engine.answer = held  # type: ignore[method-assign]
        return go

    return made


@pytest.fixture
def quick() -> Callable[..., Deadlines]:
    """Deadlines for tests, with changes."""
    return lambda **changes: replace(QUICK, **changes)


@dataclass
class Raw:
    """A response read from a plain socket, byte for byte."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The data of each event; [DONE] stays text."""
        pieces = [e for e in self.body.decode().split("\n\n") if e]
        assert all(p.startswith("data: ") for p in pieces), self.body
        return [p[6:] if p == "data: [DONE]" else json.loads(p[6:]) for p in pieces]


@dataclass
class Rig:
    """The proxy under test and the engines behind it."""

    url: str
    app: Any
    producers: list[FakeEngine]
    consumers: list[FakeEngine]
    client: httpx.AsyncClient
    server: uvicorn.Server
    baseline: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def fleet(self) -> Any:
        return self.app.state.fleet

    @property
    def p(self) -> FakeEngine:
        return self.producers[0]

    @property
    def d(self) -> FakeEngine:
        return self.consumers[0]

    async def post(self, path: str, body: Any, **headers: str) -> Raw:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        reply = await self.client.post(self.url + path, content=content, headers=sent)
        return Raw(reply.status_code, dict(reply.headers), reply.content)

    async def get(self, path: str) -> Raw:
        reply = await self.client.get(self.url + path)
        return Raw(reply.status_code, dict(reply.headers), reply.content)

    async def complete(self, **body: Any) -> Raw:
        return await self.post("/v1/completions", {"model": "fake", "prompt": "one two three", **body})

    async def open(self, path: str, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Sends a request on a socket of its own, so that a test can leave when it likes."""
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        raw = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        )
        writer.write(head.encode() + raw)
        return reader, writer

    def value(self, name: str, **labels: str) -> float:
        found = self.app.state.registry.get_sample_value(name, labels)
        return 0.0 if found is None else float(found)

    async def settled(self) -> None:
        """Nothing may be left of any request: no task, no open upstream connection, no count."""
        fleet = self.fleet
        await _until(lambda: all(i.in_flight == 0 and i.upstream.busy == 0 for i in fleet.instances))
        await _until(lambda: all(e.running == 0 for e in self.producers + self.consumers))
        await _until(lambda: not self.extra_tasks())

    def extra_tasks(self) -> list[asyncio.Task[Any]]:
        """Tasks that are neither of the test, of the server's own, nor a probe."""
        known = ("probe ", "Task-main")
        found = []
        for task in asyncio.all_tasks() - self.baseline:
            what = getattr(task.get_coro(), "__qualname__", "")
            if (
                not task.done() and not task.get_name().startswith(known) and "run_asgi" in what + task.get_name()
            ) or "watching" in what:
                found.append(task)
        return found


async def _until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Waits for a condition; its bound is generous because it is only ever reached when the test fails."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event to set
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def _listening(serve: Callable[..., Any], writers: list[asyncio.StreamWriter]) -> AsyncIterator[str]:
    """A server whose connections `serve` answers by hand; at the end it closes `writers`, those that are open."""
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    for writer in writers:
        writer.close()
    await server.wait_closed()


@contextlib.asynccontextmanager
async def _rig(
    producers: int = 1,
    consumers: int = 1,
    both: int = 0,
    engine: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Rig]:
    """Starts engines and a proxy; afterwards checks that nothing is left of any request."""
    async with contextlib.AsyncExitStack() as stack:
        options = engine or {}

        async def start(name: str) -> FakeEngine:
            return await stack.enter_async_context(FakeEngine(name=name, **options))

        ps = [await start(f"prefill-{i}") for i in range(producers)]
        ds = [await start(f"decode-{i}") for i in range(consumers)]
        bs = [await start(f"both-{i}") for i in range(both)]
        instances = tuple((e.name, e.name.rpartition("-")[0], e.url) for e in ps + ds + bs)
        given = {"instances": instances, "deadlines": QUICK, "probe_every": 0.05, **settings}
        made_settings = Settings(**given)
        app = proxy_app.build(made_settings)
        async with (
            serving(app, made_settings) as (url, server),
            httpx.AsyncClient(timeout=60, verify=False) as client,
        ):
            made = Rig(url, app, ps, ds + bs, client, server, set(asyncio.all_tasks()))
            yield made
            await made.settled()


@contextlib.asynccontextmanager
async def serving(app: Any, settings: Settings) -> AsyncIterator[tuple[str, uvicorn.Server]]:
    """As Server.serve does it, but without its ten ticks a second and its signal handlers, a process's own."""
    config = proxy_app.serve_config(app, settings)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0), backlog=512)) as bound:
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        await server.startup(sockets=[bound])
        try:
            yield url, server
        finally:
            await server.shutdown(sockets=[bound])


@pytest.fixture
def uncollected() -> Iterator[None]:
    """What is in a circle stays: it counts, and can be seen."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def unlogged() -> Iterator[None]:
    """pytest keeps log records, and what they hold."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)

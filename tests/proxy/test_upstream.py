from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from pdserve.engines.fake.server import FakeEngine, Fault
from pdserve.errors import ConfigError
from pdserve.proxy.upstream import PAUSE_AT, LegFailure, Upstream

pytestmark = pytest.mark.anyio

BODY = b'{"prompt":"a b","max_tokens":3}'
STREAM = b'{"prompt":"a b","max_tokens":3,"stream":true}'
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


@contextlib.asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[Upstream]:
    """An upstream to a server that does with each connection what the script says."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await script(reader, writer)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    upstream = Upstream("x", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield upstream
    finally:
        await upstream.close()
        server.close()
        await server.wait_closed()


async def ask(upstream: Upstream, body: bytes = BODY, seconds: float = 5) -> tuple[int, bytes]:
    async with asyncio.timeout(seconds), upstream.request(b"POST", b"/v1/completions", (), body, 2) as answer:
        return answer.status, await answer.read(1 << 20)


def says(raw: bytes) -> Script:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(raw)

    return script


async def test_connections_are_kept_and_reused() -> None:
    async with FakeEngine() as engine:
        upstream = Upstream("x", engine.url)
        for body in (BODY, STREAM, BODY):
            assert (await ask(upstream, body))[0] == 200
            assert len(engine.connections) == 1
        await asyncio.gather(*(ask(upstream) for _ in range(5)))
        assert len(engine.connections) == 5
        assert upstream.busy == 0
        assert "busy=0 idle=5" in repr(upstream)
        await upstream.close()


async def test_the_surplus_of_a_burst_goes(until: Any) -> None:
    """The latest is taken first, so that the oldest would stay for good where an engine keeps them open."""
    async with FakeEngine() as engine:
        upstream = Upstream("x", engine.url)
        await asyncio.gather(*(ask(upstream) for _ in range(5)))
        for connection in list(upstream._idle)[:-1]:
            connection.idle_since = float("-inf")
        await ask(upstream)
        await until(lambda: len(engine.connections) == 1)
        assert "busy=0 idle=1" in repr(upstream)
        await upstream.close()


async def test_leaving_early_closes_the_connection(until: Any) -> None:
    async with FakeEngine(gap=0.01) as engine:
        upstream = Upstream("x", engine.url)
        async with upstream.request(b"POST", b"/v1/completions", (), STREAM.replace(b"3", b"4000"), 2) as answer:
            assert await answer.chunk(5)
        assert upstream.busy == 0
        await until(lambda: engine.seen[0].aborted and not engine.connections)


async def test_cancelling_closes_the_connection(until: Any) -> None:
    async with FakeEngine() as engine:
        engine.always = Fault("stall")
        upstream = Upstream("x", engine.url)
        task = asyncio.create_task(ask(upstream))
        await until(lambda: len(engine.seen) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert upstream.busy == 0
        await until(lambda: engine.seen[0].aborted)


async def test_a_connection_that_the_engine_closed_meanwhile_is_not_an_error() -> None:
    async with FakeEngine() as engine:
        upstream = Upstream("x", engine.url)
        await ask(upstream)
        for connection in list(engine.connections):
            connection.transport.close()
        assert (await ask(upstream))[0] == 200  # whether or not the close has been seen by now
        await upstream.close()


async def test_a_kept_connection_closed_upon_the_next_request_is_tried_once_more() -> None:
    served = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        await reader.readuntil(b"\r\n\r\n")
        served += 1
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await reader.readuntil(b"\r\n\r\n")  # reads the second request and closes without a word

    async with scripted(script) as upstream:
        assert await ask(upstream, b"") == (200, b"ok")
        assert await ask(upstream, b"") == (200, b"ok")
        assert served == 2


async def test_a_new_connection_closed_without_a_word_is_broken() -> None:
    async with scripted(says(b"")) as upstream:
        with pytest.raises(LegFailure, match="before the answer was complete") as failure:
            await ask(upstream)
        assert (failure.value.reason, failure.value.status) == ("broken", 502)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00",
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-le",
    ],
)
async def test_what_is_not_a_whole_answer_is_broken(raw: bytes) -> None:
    async with scripted(says(raw)) as upstream:
        with pytest.raises(LegFailure) as failure:
            await ask(upstream)
        assert failure.value.reason == "broken"
        assert upstream.busy == 0


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", (200, b"until the end")),
        (b"HTTP/1.0 200 OK\r\n\r\nold", (200, b"old")),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", (200, b"ok")),
        (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"")),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n", (500, b"")),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", (200, b"abc")),
    ],
)
async def test_forms_of_an_answer(raw: bytes, expected: tuple[int, bytes]) -> None:
    async with scripted(says(raw)) as upstream:
        assert await ask(upstream) == expected


async def test_refused_and_late() -> None:
    async with FakeEngine() as engine:
        url = engine.url
    with pytest.raises(LegFailure, match="refused") as refused:
        await ask(Upstream("gone", url))
    assert (refused.value.reason, refused.value.status, refused.value.instance) == ("connect", 502, "gone")

    async with FakeEngine() as engine:
        engine.always = Fault("mute", after=1)
        upstream = Upstream("mute", engine.url)

        async def drain() -> None:
            async with upstream.request(b"POST", b"/v1/completions", (), STREAM, 2) as answer:
                while await answer.chunk(0.1):
                    pass

        with pytest.raises(LegFailure) as late:
            await drain()
        assert (late.value.reason, late.value.status) == ("timeout", 504)


async def test_an_answer_beyond_its_limit_is_broken() -> None:
    async with FakeEngine() as engine:
        upstream = Upstream("x", engine.url)
        with pytest.raises(LegFailure, match="larger than 10 bytes"):
            async with upstream.request(b"POST", b"/v1/completions", (), BODY, 2) as answer:
                await answer.read(10)
        await upstream.close()


async def test_a_fast_engine_is_held_back_by_a_slow_reader(until: Any) -> None:
    written = 0
    piece = b"x" * 65536

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(1000):
            writer.write(piece)
            await writer.drain()
            written += len(piece)

    async with scripted(script) as upstream:
        async with upstream.request(b"POST", b"/", (), b"", 2) as answer:
            await until(lambda: answer._connection._paused)
            assert answer._connection._held < PAUSE_AT + 1024 * 1024
            assert written < 64 * 1024 * 1024
            total = 0
            while data := await answer.chunk(5):
                total += len(data)
        assert total == 1000 * len(piece)


async def test_no_more_connections_than_allowed() -> None:
    async with FakeEngine(delay=0.05) as engine:
        upstream = Upstream("x", engine.url, max_connections=2)
        results = await asyncio.gather(*(ask(upstream) for _ in range(3)), return_exceptions=True)
        assert [r[0] for r in results if isinstance(r, tuple)] == [200, 200]
        assert [r.status for r in results if isinstance(r, LegFailure)] == [503]
        await upstream.close()


@pytest.mark.parametrize("url", ["", "127.0.0.1:8100", "ftp://x", "http://", "http://x:port", "http://x:0"])
def test_a_url_that_is_none_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match="is not an http:// or https:// URL"):
        Upstream("decode-0", url)


async def test_a_path_in_the_url_is_kept() -> None:
    async with FakeEngine() as engine:
        upstream = Upstream("x", engine.url + "/base/")
        assert (await ask(upstream))[0] == 404
        assert engine.seen[0].path == "/base/v1/completions"
        await upstream.close()

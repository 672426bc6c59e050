"""The HTTP clients that the proxy could have been built on, each doing the same against one instant engine."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx

from pdserve.proxy.upstream import Upstream

HEADERS = [(b"content-type", b"application/json")]


async def first_token(upstream: Upstream, body: bytes) -> float:
    """Seconds to the first bytes of the stream, over a kept connection."""
    began = time.perf_counter()
    async with upstream.request(b"POST", b"/v1/completions", HEADERS, body, 5) as answer:
        await answer.chunk(30)
        took = time.perf_counter() - began
        while await answer.chunk(30):
            pass
    return took


@contextlib.asynccontextmanager
async def libraries(url: str, body: bytes) -> AsyncIterator[dict[str, Callable[[], Awaitable[float]]]]:
    """The candidates for the proxy's client, each doing the same: POST, first bytes of the stream, rest."""
    path, own = url + "/v1/completions", Upstream("own", url)
    kind = {"content-type": "application/json"}

    async def by_own() -> float:
        return await first_token(own, body)

    async def by_httpx() -> float:
        began, took = time.perf_counter(), 0.0
        async with slow.stream("POST", path, content=body, headers=kind) as answer:
            async for _ in answer.aiter_raw():
                took = took or time.perf_counter() - began
        return took

    rows = {"plain socket": plain_socket(url, body), "upstream.py": by_own, "httpx": by_httpx}
    async with httpx.AsyncClient(timeout=30) as slow, contextlib.AsyncExitStack() as stack:
        try:
            import aiohttp
        except ImportError:
            yield rows
            return
        middle = await stack.enter_async_context(aiohttp.ClientSession())

        async def by_aiohttp() -> float:
            began, took = time.perf_counter(), 0.0
            async with middle.post(path, data=body, headers=kind) as answer:
                async for _ in answer.content.iter_any():
                    took = took or time.perf_counter() - began
            return took

        yield {**rows, "aiohttp": by_aiohttp}


def plain_socket(url: str, body: bytes) -> Callable[[], Awaitable[float]]:
    """The floor: a socket, no parsing, the end known by its last bytes."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    kept: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def measure() -> float:
        if not kept:
            kept.append(await asyncio.open_connection(host, int(port)))
        reader, writer = kept[0]
        began = time.perf_counter()
        writer.write(head + body)
        await reader.readuntil(b"data: ")
        took = time.perf_counter() - began
        await reader.readuntil(b"0\r\n\r\n")
        return took

    return measure

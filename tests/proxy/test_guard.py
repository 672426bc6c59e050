from __future__ import annotations

import asyncio
import json
import resource
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.anyio


async def connect(r: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = r.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def told(reader: asyncio.StreamReader) -> tuple[int, Any]:
    """The status and the JSON of an answer that ends with its connection."""
    raw = await asyncio.wait_for(reader.read(), 60)
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


async def test_a_head_without_end(rig: Any) -> None:
    async with rig(max_head=4096) as r:
        reader, writer = await connect(r)
        writer.write(b"POST /v1/completions HTTP/1.1\r\n" + b"x-a: " + b"b" * 5000)
        status, error = await told(reader)
        assert (status, error["error"]["message"]) == (431, "The head of the request is larger than 4096 bytes (--max-head-kib).")
        writer.close()


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"])
async def test_a_head_that_does_not_come(rig: Any, quick: Any, sent: bytes) -> None:
    async with rig(deadlines=quick(head=0.2)) as r:
        reader, writer = await connect(r)
        writer.write(sent)
        status, error = await told(reader)
        assert (status, error["error"]["code"]) == (408, 408)
        writer.close()


async def test_a_drop_at_a_time_does_not_help(rig: Any, quick: Any) -> None:
    async with rig(deadlines=quick(head=0.3)) as r:
        reader, writer = await connect(r)
        answer = asyncio.create_task(told(reader))
        for byte in b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n" * 3:
            # A byte to one that has answered and closed would reset the connection, and the answer with it.
            for _ in range(9):
                await asyncio.sleep(0)
            if answer.done():
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)
        assert (await answer)[0] == 408
        writer.close()


async def test_a_body_that_takes_its_time_is_not_a_head(rig: Any, quick: Any) -> None:
    async with rig(deadlines=quick(head=0.5), max_head=1000) as r:
        raw = json.dumps({"prompt": "a " * 1000, "max_tokens": 2}).encode()
        reader, writer = await connect(r)
        for _ in range(2):  # and the same on a connection that is used again
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(raw))
            await asyncio.sleep(0.7)
            writer.write(raw)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.split()[1] == b"200"
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        writer.close()


async def test_connections_beyond_the_limit_are_told_so(rig: Any) -> None:
    async with rig(max_connections=20) as r:
        kept = [await connect(r) for _ in range(20)]
        reader, writer = await connect(r)
        assert (await told(reader))[0] == 503
        for _, other in (*kept, (reader, writer)):
            other.close()


async def test_a_hundred_megabytes_are_refused_before_they_are_held(rig: Any) -> None:
    async with rig(max_body=1_000_000) as r:
        reader, writer = await connect(r)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 104857600\r\n\r\n")
        sent = 0
        while sent < 104_857_600 and not reader._buffer and not writer.transport.is_closing():
            writer.write(b"x" * 65536)
            sent += 65536
            try:
                await asyncio.wait_for(writer.drain(), 5)
            except (TimeoutError, ConnectionError):
                break
        assert (await reader.readline()).split()[1] == b"413"
        assert sent < 20_000_000
        writer.transport.abort()


@pytest.mark.parametrize("expect", [b"", b"expect: 100-continue\r\n"])
async def test_a_body_that_is_said_to_be_too_large_is_not_waited_for(rig: Any, expect: bytes) -> None:
    async with rig(max_body=1000) as r:
        reader, writer = await connect(r)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n" + expect + b"\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
        assert head.startswith(b"HTTP/1.1 413 ")
        assert (b"\r\nconnection: close\r\n" in head) == bool(expect)  # the next bytes may be a body or a request
        writer.close()


async def test_a_refused_body_is_dropped_and_the_connection_goes_on(rig: Any) -> None:
    async with rig(max_body=1000) as r:
        reader, writer = await connect(r)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n")
        assert b" 413 " in await asyncio.wait_for(reader.readline(), 30)
        writer.write(b"x" * 5000 + b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        while b" 200 " not in (line := await asyncio.wait_for(reader.readline(), 30)):
            assert line, "the connection was closed"
        writer.close()


async def test_ten_thousand_idle_connections_cost_little_and_hinder_nobody(rig: Any) -> None:
    """As many as the files that a process may open allow: each takes two here, the client's end and the server's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 32_000), hard))
    count = min(10_000, (min(hard, 32_000) - 2000) // 2)
    if count < 1000:
        pytest.skip(f"this process may open {hard} files only")
    try:
        async with rig() as r:
            before, idle = resident(), []
            for _ in range(0, count, 500):
                idle += await asyncio.gather(*(connect(r) for _ in range(500)))
            assert (await r.complete()).status == 200
            assert (resident() - before) / len(idle) < 100 * 1024  # both ends together
            for _, writer in idle:
                writer.transport.abort()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

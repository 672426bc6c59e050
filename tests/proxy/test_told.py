from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pdserve.engines.vllm.facts import StoreFacts, Teller
from pdserve.proxy.told import Caches

pytestmark = pytest.mark.anyio


async def test_daemons_are_asked_at_once_and_those_that_do_not_answer_are_left_out(cache_daemon: Any) -> None:
    teller = Teller(str(cache_daemon.socket), "prefill-0")
    StoreFacts(teller).stored("cmpl-one-0-0123abcd", 16, 100, 0.1, 0)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    here = ("here", f"http://127.0.0.1:{cache_daemon.port}")
    caches = Caches((("dead", "http://127.0.0.1:9"), ("silent", f"http://127.0.0.1:{port}"), here), "")
    async with asyncio.timeout(30):
        while not (found := await caches.legs(["one", "two"])):  # noqa: ASYNC110 - another process tells, in its time
            await asyncio.sleep(0.05)
    assert found.keys() == {"one"}
    assert [(leg["instance"], leg["spans"][0]["name"]) for leg in found["one"]] == [("prefill-0", "store")]
    assert await caches.legs([]) == {}
    await caches.stop()
    server.close()
    await server.wait_closed()
    await asyncio.to_thread(teller.close)


async def test_the_admin_token_is_the_daemons_too(start_cache: Any, tmp_path: Any) -> None:
    daemon = start_cache(tmp_path, "told", 64 << 20, env={"PDSERVE_ADMIN_TOKEN": "boss"})
    teller = Teller(str(daemon.socket), "prefill-0")
    StoreFacts(teller).stored("cmpl-one-0-0123abcd", 16, 100, 0.1, 0)
    url = f"http://127.0.0.1:{daemon.port}"
    right, wrong = Caches((("a", url),), "boss"), Caches((("a", url),), "")
    async with asyncio.timeout(30):
        while not await right.legs(["one"]):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.05)
    assert await wrong.legs(["one"]) == {}
    await right.stop()
    await wrong.stop()
    await asyncio.to_thread(teller.close)

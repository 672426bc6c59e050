"""A server that answers at once: what a request costs the client itself. Run beside the load, in a process of its own.

python -m pdserve.bench.instant        prints its port
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, cast

import httptools


class _Instant(asyncio.Protocol):
    """Any POST is answered by a stream of as many events as its max_tokens says, all of them at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._parser: Any = httptools.HttpRequestParser(self)
        self._body = bytearray()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        asked = json.loads(bytes(self._body))
        self._body = bytearray()
        out = int(asked.get("max_tokens") or 1)
        event = b'data: {"id":"cmpl-0","choices":[{"index":0,"text":" word","finish_reason":null}]}\n\n'
        usage = {"prompt_tokens": 1, "completion_tokens": out, "total_tokens": out + 1}
        last = b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n"
        body = event * out + last
        head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        self.transport.writelines((head, body))


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Instant, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    # ends when the one who started it does: its end of the pipe is closed then
    await loop.run_in_executor(None, sys.stdin.buffer.read)


if __name__ == "__main__":
    asyncio.run(_serve())

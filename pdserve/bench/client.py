"""The load's own OpenAI client: streaming over kept connections, with the time of every event taken as its bytes arrive.

It parses HTTP by httptools and events by msgspec, because a client that is slow measures itself. One connection carries one
request at a time; http and https; nothing is sent twice, except on a connection that idled until the server closed it.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

from pdserve.errors import ConfigError

CONNECT_TIMEOUT = 10.0
ERROR_BYTES = 2000
IDLE = (
    1.0  # seconds after which a server may have closed a kept connection by itself; sooner, a closed one is a failure
)
EVENT_LIMIT = 16 << 20  # bytes of one event or of a body that is none


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None
    id: str = ""


_decode = msgspec.json.Decoder(_Event).decode


class Broken(Exception):
    """The request did not come to its end; the message says how. `fresh`: nothing of an answer had come."""

    def __init__(self, message: str, *, fresh: bool = False, status: int = 0) -> None:
        super().__init__(message)
        self.fresh, self.status = fresh, status


@dataclass(slots=True)
class Reply:
    """What came back. Times are time.perf_counter()'s; `tokens_at` has one entry per event that carried text."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    sent: float = 0.0
    tokens_at: list[float] = field(default_factory=list)
    ended: float = 0.0
    text: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    finish_reason: str = ""
    id: str = ""


@dataclass(frozen=True, slots=True)
class Address:
    scheme: str
    host: str
    port: int
    path: str  # before /v1

    @classmethod
    def of(cls, url: str) -> Address:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("url", f"{url!r} is no http or https URL", "Write it like http://127.0.0.1:8000.")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return cls(parts.scheme, parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1"))

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


class StreamClient:
    """One server. Close it in the end; connections are kept between requests."""

    def __init__(self, url: str, api_key: str = "", headers: Mapping[str, str] | None = None) -> None:
        self.address = Address.of(url)
        self._tls = ssl.create_default_context() if self.address.scheme == "https" else None
        lines = {
            "host": f"{self.address.host}:{self.address.port}",
            "content-type": "application/json",
            "accept": "*/*",
        }
        if api_key:
            lines["authorization"] = f"Bearer {api_key}"
        lines |= {name.lower(): value for name, value in (headers or {}).items()}
        if any("\r" in v or "\n" in v for v in lines.values()):
            raise ConfigError("--api-key, --header", "contains a line break")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._kept: list[_Connection] = []

    async def __aenter__(self) -> StreamClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        while self._kept:
            self._kept.pop().abort()

    async def stream(self, path: str, body: bytes, limit: float, request_id: str = "") -> Reply:
        """One streamed completion. Raises Broken, or TimeoutError when it has not ended `limit` seconds after it was sent."""
        named = f"x-request-id: {request_id}\r\n" if request_id else ""
        head = f"POST {self.address.path}{path} HTTP/1.1\r\n{self._head}{named}content-length: {len(body)}\r\n\r\n".encode()
        began = time.perf_counter()
        async with asyncio.timeout(limit):
            while True:
                connection, stale = await self._connection()
                try:
                    reply = await connection.exchange(head, body)
                except Broken as broken:
                    if stale and broken.fresh:
                        continue
                    raise
                finally:
                    if connection.reusable:
                        self._kept.append(connection)
                    else:
                        connection.abort()
                reply.sent = began
                return reply

    async def _connection(self) -> tuple[_Connection, bool]:
        """A connection, and whether it has been idle so long that it may be closed without anybody's fault."""
        while self._kept:
            connection = self._kept.pop()
            if connection.alive:
                return connection, time.perf_counter() - connection.used > IDLE
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                _, made = await loop.create_connection(_Connection, self.address.host, self.address.port, ssl=self._tls)
        except TimeoutError:
            raise Broken(f"no connection to {self.address.url} within {CONNECT_TIMEOUT:g} s") from None
        except OSError as error:
            raise Broken(f"no connection to {self.address.url}: {error}") from error
        return made, False


class _Connection(asyncio.Protocol):
    """One connection: an exchange at a time, its parser fed as bytes come in."""

    def __init__(self) -> None:
        self.alive, self.reusable = False, False
        self.used = 0.0
        self._transport: asyncio.Transport
        self._done: asyncio.Future[Reply] | None = None
        self._reply = Reply()
        self._buffer = bytearray()
        self._parser: Any = None
        self._now = 0.0
        self._error = b""
        self._events = self._finished = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.alive = True

    async def exchange(self, head: bytes, body: bytes) -> Reply:
        self._done = asyncio.get_running_loop().create_future()
        self._reply, self._parser = Reply(), httptools.HttpResponseParser(self)
        self._buffer, self._error = bytearray(), b""
        self._events = self._finished = self.reusable = False
        self._transport.writelines((head, body))
        return await self._done

    def abort(self) -> None:
        self.alive = self.reusable = False
        self._transport.abort()

    # ---- what asyncio calls ----

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        if self._done is None or self._done.done():
            return self.abort()  # bytes that nobody asked for
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"no HTTP came back: {error}")
        except msgspec.DecodeError as error:
            self._fail(f"an event that is not JSON: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.alive = self.reusable = False
        if self._done is None or self._done.done():
            return
        self._now = time.perf_counter()
        if self._reply.status and not self._events and self._reply.status != 200:
            return self._refuse()
        fresh = self._reply.status == 0
        self._fail(f"the connection was closed {'before an answer' if fresh else 'in the middle of the answer'}", fresh)

    # ---- what the parser calls ----

    def on_header(self, name: bytes, value: bytes) -> None:
        self._reply.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._reply.status = self._parser.get_status_code()
        self._events = self._reply.status == 200

    def on_body(self, body: bytes) -> None:
        if not self._events:
            self._error = (self._error + body)[:ERROR_BYTES]
            return
        self._buffer += body
        if len(self._buffer) > EVENT_LIMIT:
            return self._fail(f"an event of over {EVENT_LIMIT >> 20} MiB")
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = rest
        for line in lines:
            if line.startswith(b"data:"):
                self._event(bytes(line[5:]).strip())

    def on_message_complete(self) -> None:
        if self._done is None or self._done.done():
            return
        if not self._events:
            return self._refuse()
        self.reusable = bool(self._parser.should_keep_alive())
        self._reply.ended = self.used = self._now
        if not self._finished:
            rest = bytes(self._buffer[:200]).decode(errors="replace")
            return self._fail(f"the stream ended without [DONE] {rest}".strip())
        self._done.set_result(self._reply)

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self._finished = True
            return
        event, reply = _decode(data), self._reply
        if event.error is not None:
            return self._fail(f"the stream carried an error: {str(event.error)[:300]}")
        reply.id = reply.id or event.id
        if event.usage is not None:
            reply.prompt_tokens, reply.output_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
            details = event.usage.prompt_tokens_details
            reply.cached_tokens = details.cached_tokens if details else None
        for choice in event.choices[:1]:
            reply.finish_reason = choice.finish_reason or reply.finish_reason
            if text := _text(choice):
                reply.tokens_at.append(self._now)
                reply.text.append(text if isinstance(text, str) else "")

    def _refuse(self) -> None:
        text = " ".join(self._error.decode(errors="replace").split())[:300]
        self.reusable = self.alive and bool(self._parser.should_keep_alive())
        self._fail(f"HTTP {self._reply.status} {text}".strip(), status=self._reply.status)

    def _fail(self, message: str, fresh: bool = False, status: int = 0) -> None:
        if self._done is not None and not self._done.done():
            if not status:
                self.reusable = False
            self._done.set_exception(Broken(message, fresh=fresh, status=status))


def _text(choice: _Choice) -> Any:
    """What of a choice is output: text, reasoning, a tool call; or a token that is no text yet (a part of a character)."""
    if choice.text is not None:
        return choice.text or choice.token_ids
    delta = choice.delta
    if delta is None:
        return None
    return delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls or choice.token_ids

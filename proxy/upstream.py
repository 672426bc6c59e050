"""The HTTP/1.1 client to one engine: connections kept and reused, one request on each at a time, every wait bounded.

Written on httptools because the proxy's whole cost is this client's cost twice over (docs/decisions.md has the figures
beside httpx and aiohttp). It does what an engine behind a proxy needs and no more: no redirects, cookies or HTTP/2.

Foreign errors end here: callers see LegFailure, whose `reason` is one of connect, timeout, status, broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import cast
from urllib.parse import SplitResult, urlsplit

import httptools

from pdserve.errors import ConfigError, UpstreamError

Headers = Iterable[tuple[bytes, bytes]]

PAUSE_AT = 256 * 1024  # bytes waiting for a slow client before the engine's socket is no longer read
IDLE_LIMIT = 4.0  # uvicorn, which vLLM runs on, closes idle connections after 5 s
MAX_CONNECTIONS = 4096


class LegFailure(UpstreamError):
    """A leg did not work out. `status` is what the client is told if nothing else can be tried."""

    def __init__(self, status: int, message: str, instance: str, reason: str, body: bytes = b"") -> None:
        super().__init__(status, message, instance, body)
        self.reason = reason


class _Broken(Exception):
    """The connection ended or sent something that is not HTTP. `silent`: before the first byte of an answer."""

    def __init__(self, message: str, silent: bool) -> None:
        super().__init__(message)
        self.silent = silent


class _Connection(asyncio.Protocol):
    """One connection. httptools calls the on_ methods while bytes are fed; whoever waits is woken through `_waiter`."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.idle_since = 0.0
        self.used = False
        self.closed = False
        self._waiter: asyncio.Future[None] | None = None
        self._paused = False
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.has_head = self.complete = self._counted = self._kept = False
        self.error: _Broken | None = None
        self.chunks: deque[bytes] = deque()
        self._held = 0
        self._touched = False

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are not subclasses of it

    def data_received(self, data: bytes) -> None:
        if self.complete or self.error:
            self.abort()  # more than was asked for: nothing after it can be trusted
            return
        self._touched = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._fail(f"it sent something that is not HTTP ({exc})")
            self.abort()
        if self._held > PAUSE_AT and not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        # Without a length the end of the connection is the end of the body, if it was an orderly end.
        if self.has_head and not self._counted and exc is None and self.error is None:
            self.complete = True
        if not self.complete:
            self._fail("it closed the connection before the answer was complete")
        self._wake()

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._counted = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self.has_head = self.status >= 200

    def on_body(self, body: bytes) -> None:
        self.chunks.append(body)
        self._held += len(body)

    def on_message_complete(self) -> None:
        if self.status < 200:  # 100 Continue and the like: the answer is still to come
            self.headers = []
            return
        self._kept = self._parser.should_keep_alive()  # only to be asked now: afterwards the parser has forgotten
        self.complete = True

    # What the pool and the answer call.

    def start(self, head: bytes, body: bytes) -> None:
        if self.used:
            self._reset()
        self.used = True
        assert self.transport is not None
        self.transport.writelines((head, body)) if body else self.transport.write(head)

    async def head(self) -> None:
        """Waits for status and headers."""
        while not self.has_head:
            if self.error is not None:
                raise self.error
            await self._wait()

    async def chunk(self) -> bytes:
        """The body bytes that have come since the last call, all of them; b"" at the end."""
        while not self.chunks:
            if self.complete:
                return b""
            if self.error is not None:
                raise self.error
            await self._wait()
        data = self.chunks.popleft() if len(self.chunks) == 1 else b"".join(self.chunks)
        self.chunks.clear()
        self._held = 0
        if self._paused and self.transport is not None and not self.closed:
            self._paused = False
            self.transport.resume_reading()
        return data

    @property
    def reusable(self) -> bool:
        return self.complete and not self.closed and not self.chunks and self._kept

    def abort(self) -> None:
        self.closed = True
        if self.transport is not None:
            self.transport.abort()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, message: str) -> None:
        if self.error is None:
            self.error = _Broken(message, silent=not self._touched)


class Answer:
    """An engine's answer whose head has come."""

    def __init__(self, connection: _Connection, instance: str) -> None:
        self._connection = connection
        self.instance = instance
        self.status = connection.status
        self.headers = connection.headers

    def header(self, name: bytes) -> bytes:
        return next((value for key, value in self.headers if key == name), b"")

    async def chunk(self, wait: float) -> bytes:
        """The next bytes of the body as they came, or b"" at its end. Raises LegFailure."""
        connection = self._connection
        if connection.chunks or connection.complete:  # no timer where nothing has to be waited for
            return await connection.chunk()
        with _bounded(self.instance):
            async with asyncio.timeout(wait):
                return await connection.chunk()

    async def read(self, limit: int) -> bytes:
        """The whole body; the caller bounds the time. Raises LegFailure."""
        parts, size = [], 0
        with _bounded(self.instance):
            while data := await self._connection.chunk():
                size += len(data)
                if size > limit:
                    raise LegFailure(502, f"its answer is larger than {limit} bytes", self.instance, "broken")
                parts.append(data)
        return b"".join(parts)


class Upstream:
    """The connections to one instance. `busy` counts those that carry a request; at rest it is zero."""

    def __init__(self, name: str, url: str, max_connections: int = MAX_CONNECTIONS) -> None:
        self.name, self.url = name, url
        self.busy = 0
        self._max = max_connections
        self._idle: list[_Connection] = []
        parts = _checked(name, url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._address = (parts.hostname or "", parts.port or (443 if self._tls else 80))
        self._prefix = parts.path.rstrip("/").encode()
        self._host = b"host: " + parts.netloc.rpartition("@")[2].encode() + b"\r\n"

    def __repr__(self) -> str:
        return f"<Upstream {self.name} {self.url} busy={self.busy} idle={len(self._idle)}>"

    @contextlib.asynccontextmanager
    async def request(
        self, method: bytes, path: bytes, headers: Headers, body: bytes, connect: float
    ) -> AsyncIterator[Answer]:
        """Sends a request and gives its answer once the head has come. Bound the wait for it with asyncio.timeout.

        Leaving the block before the body was read to its end closes the connection, which is what makes an engine stop
        working on the request. A reused connection that turns out to have been closed by the engine is tried once more
        on a new one: the engine never saw the request.
        """
        if self.busy >= self._max:
            raise LegFailure(503, f"{self._max} requests are already open", self.name, "connect")
        lines = b"".join([b"%b: %b\r\n" % pair for pair in headers])
        target = b"%b %b%b HTTP/1.1\r\n" % (method, self._prefix, path)
        head = b"%b%bcontent-length: %d\r\n%b\r\n" % (target, self._host, len(body), lines)
        self.busy += 1
        connection: _Connection | None = None
        try:
            with _bounded(self.name):
                connection = self._reuse() or await self._connect(connect)
                reused = connection.used
                connection.start(head, body)
                try:
                    await connection.head()
                except _Broken as exc:
                    if not (reused and exc.silent):
                        raise
                    connection = await self._connect(connect)
                    connection.start(head, body)
                    await connection.head()
            yield Answer(connection, self.name)
        finally:
            self.busy -= 1
            if connection is not None:
                self._give_back(connection)

    async def close(self) -> None:
        """Drops the idle connections. Those in use end with their requests."""
        for connection in self._idle:
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # lets the loop run the connections' last callbacks

    def _reuse(self) -> _Connection | None:
        oldest = asyncio.get_running_loop().time() - IDLE_LIMIT
        while self._idle:
            connection = self._idle.pop()  # the latest, so that the surplus of a burst ages and goes
            if not connection.closed and connection.idle_since > oldest:
                return connection
            connection.abort()
        return None

    async def _connect(self, wait: float) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(wait):
                _, connection = await loop.create_connection(_Connection, *self._address, ssl=self._tls)
                return connection
        except TimeoutError as exc:
            raise LegFailure(504, f"no connection within {wait:g} s", self.name, "connect") from exc
        except OSError as exc:
            raise LegFailure(502, f"no connection ({exc.strerror or exc})", self.name, "connect") from exc

    def _give_back(self, connection: _Connection) -> None:
        if connection.reusable:
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            connection.abort()


def _checked(name: str, url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        ok = False
    if not ok:
        raise ConfigError(name, f"{url!r} is not an http:// or https:// URL", "Write it like http://127.0.0.1:8100.")
    return parts


@contextlib.contextmanager
def _bounded(instance: str) -> Iterator[None]:
    """Turns what can go wrong inside into LegFailure."""
    try:
        yield
    except TimeoutError as exc:
        raise LegFailure(504, "it did not answer in time", instance, "timeout") from exc
    except _Broken as exc:
        raise LegFailure(502, str(exc), instance, "broken") from exc

"""The HTTP/1.1 client to one engine: connections kept and reused, one request on each at a time, every wait bounded.

Written on httptools because the proxy's whole cost is this client's cost twice over (docs/decisions.md has the figures
beside httpx and aiohttp). It does what an engine behind a proxy needs and no more: no redirects, cookies or HTTP/2.

Foreign errors end here: callers see LegFailure, whose `reason` is one of connect, timeout, status, broken.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

import httptools

from pdserve.errors import ConfigError, UpstreamError
from pdserve.proxy.watch import Watch

Headers = Iterable[tuple[bytes, bytes]]
Sink = Callable[[bytes, bool], bool]

PAUSE_AT = 256 * 1024  # bytes waiting for a slow client before the engine's socket is no longer read
IDLE_LIMIT = 4.0  # uvicorn, which vLLM runs on, closes idle connections after 5 s
MAX_CONNECTIONS = 4096
JOIN_UP_TO = 64 * 1024  # bytes of a body that are sooner copied behind the head than written as a piece of their own


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
    """One connection. httptools calls the on_ methods while bytes are fed; whoever waits is woken through `_waiter`,
    unless what comes is passed to `_sink` at once."""

    def __init__(self, watch: Watch) -> None:
        self.loop = watch.loop
        self._watch = watch
        self.transport: asyncio.Transport | None = None
        self.idle_since = 0.0
        self.used = False
        self.closed = False
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        self._sink_error: Exception | None = None
        self._gap = 0.0  # seconds that may pass without a byte; 0 where a wait has one deadline
        self._parser = cast(Any, None)
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.has_head = self.complete = self._counted = self._kept = self._paused = False
        # What went wrong, for _Broken. Not the exception: once raised it holds the frames that hold this connection and the
        # request's body, a circle that only the collector would find.
        self.error: tuple[str, bool] | None = None
        self.chunks: list[bytes] = []
        self._held = 0
        self._touched = 0.0  # when something came last; 0: nothing of this answer yet

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are not subclasses of it
        # It holds this connection, a circle until the connection is lost; one that never comes to be is not lost either.
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        if self.complete or self.error:
            self.abort()  # more than was asked for: nothing after it can be trusted
            return
        self._touched = self.loop.time()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._fail(f"it sent something that is not HTTP ({exc})")
            self.abort()
        if self._sink is not None:
            self._pour(self._sink)
        elif self._held > PAUSE_AT and not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()
        self._wake()

    def disown(self) -> None:
        """It was given up before anybody had it. The loop does not say that it is lost, so its circles are cut here."""
        self.abort()
        self.transport = self._parser = cast(Any, None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        # Without a length the end of the connection is the end of the body, if it was an orderly end.
        if self.has_head and not self._counted and exc is None and self.error is None:
            self.complete = True
        if not self.complete:
            self._fail("it closed the connection before the answer was complete")
        self._sink = None
        self._parser = cast(Any, None)  # what is in no circle goes at once
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
        if len(body) > JOIN_UP_TO:
            self.transport.writelines((head, body))
        else:
            self.transport.write(head + body)

    async def head(self, until: float | None) -> None:
        """Waits for status and headers."""
        while not self.has_head:
            if self.error is not None:
                raise _Broken(*self.error)
            await self._wait(until)

    async def chunk(self, until: float | None) -> bytes:
        """The body bytes that have come since the last call, all of them; b"" at the end."""
        while not self.chunks:
            if self.complete:
                return b""
            if self.error is not None:
                raise _Broken(*self.error)
            await self._wait(until)
        return self._taken()

    async def pass_to(self, sink: Sink, gap: float) -> bool:
        """Answer.passed_to, with this module's own errors."""
        self._sink_error = None
        if self.chunks or self.complete:
            goes_on = sink(self._taken(), self.complete) if self.chunks else sink(b"", True)
            if self.complete or not goes_on:
                return self.complete
        if self.error is not None:
            raise _Broken(*self.error)
        self._sink = sink
        try:
            await self._wait_on(gap)
        finally:
            self._sink = None
        if self._sink_error is not None:
            try:
                raise self._sink_error
            finally:
                self._sink_error = None  # as with `error`
        if self.error is not None:
            raise _Broken(*self.error)
        return self.complete and not self.chunks

    @property
    def reusable(self) -> bool:
        return self.complete and not self.closed and not self.chunks and self._kept

    def abort(self) -> None:
        self.closed = True
        if self.transport is not None:
            self.transport.abort()

    def _taken(self) -> bytes:
        data = self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)
        self.chunks.clear()
        self._held = 0
        if self._paused and self.transport is not None and not self.closed:
            self._paused = False
            self.transport.resume_reading()
        return data

    def _pour(self, sink: Sink) -> None:
        """Gives the sink what has come. The task that waits is woken only if it has something to do."""
        if not self.chunks and not self.complete:
            return
        try:
            goes_on = sink(self._taken() if self.chunks else b"", self.complete)
        except Exception as exc:  # noqa: BLE001 - raised again in pass_to, in the task whose request it is
            goes_on, self._sink_error = False, exc
        if not goes_on or self.complete:
            self._sink = None

    async def _wait(self, until: float | None) -> None:
        """Until something has come. Raises TimeoutError at `until`."""
        self._waiter = self.loop.create_future()
        if until is not None:
            self._watch.add(self, until)
        try:
            await self._waiter
        finally:
            self._waiter = None
            self._watch.remove(self)

    async def _wait_on(self, gap: float) -> None:
        """Until the sink has been taken away. Raises TimeoutError when nothing has come for `gap` seconds."""
        self._touched, self._gap = self.loop.time(), gap
        try:
            await self._wait(self._touched + gap)
        finally:
            self._gap = 0.0

    def overdue(self, now: float) -> float | None:
        """Called by the watch."""
        if self._gap and self._touched + self._gap > now:
            return self._touched + self._gap
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(TimeoutError())
        return None

    def _wake(self) -> None:
        """A sink that is still there has been given everything."""
        if self._waiter is not None and (self._sink is None or self.error) and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, message: str) -> None:
        if self.error is None:
            self.error = message, not self._touched


class Answer:
    """An engine's answer whose head has come."""

    __slots__ = ("_connection", "headers", "instance", "status")

    def __init__(self, connection: _Connection, instance: str) -> None:
        self._connection = connection
        self.instance = instance
        self.status = connection.status
        self.headers = connection.headers

    def header(self, name: bytes) -> bytes:
        return next((value for key, value in self.headers if key == name), b"")

    @property
    def exhausted(self) -> bool:
        """The body has come to its end and all of it has been taken."""
        return self._connection.complete and not self._connection.chunks

    async def chunk(self, wait: float) -> bytes:
        """The next bytes of the body as they came, or b"" at its end. Raises LegFailure."""
        return await self.chunk_by(self._connection.loop.time() + wait)

    async def chunk_by(self, until: float) -> bytes:
        """As chunk, with the time of the loop by which there must be some."""
        try:
            return await self._connection.chunk(until)
        except (TimeoutError, _Broken) as exc:
            raise _failure(exc, self.instance) from exc

    async def passed_to(self, sink: Sink, gap: float) -> bool:
        """Calls `sink` with the body's bytes as they come, and whether they are its last ones; at the end once, with or
        without bytes. False: the sink has said no, and is to be given the rest with another call. Raises LegFailure,
        and what the sink raises."""
        try:
            return await self._connection.pass_to(sink, gap)
        except (TimeoutError, _Broken) as exc:
            raise _failure(exc, self.instance) from exc

    async def read(self, limit: int, until: float | None = None) -> bytes:
        """The whole body, by `until` in the loop's time. Raises LegFailure."""
        parts, size, connection = [], 0, self._connection
        try:
            while data := await connection.chunk(until):
                size += len(data)
                if size > limit:
                    raise LegFailure(502, f"its answer is larger than {limit} bytes", self.instance, "broken")
                parts.append(data)
        except (TimeoutError, _Broken) as exc:
            raise _failure(exc, self.instance) from exc
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Upstream:
    """The connections to one instance. `busy` counts those that carry a request; at rest it is zero."""

    def __init__(self, name: str, url: str, max_connections: int = MAX_CONNECTIONS) -> None:
        self.name, self.url = name, url
        self.busy = 0
        self.max_connections = max_connections
        self._idle: deque[_Connection] = deque()  # the longest idle first
        self._watch: Watch | None = None
        parts = _checked(name, url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._address = (parts.hostname or "", parts.port or (443 if self._tls else 80))
        self._prefix = parts.path.rstrip("/").encode()
        self._host = b"host: " + parts.netloc.rpartition("@")[2].encode() + b"\r\n"

    def __repr__(self) -> str:
        return f"<Upstream {self.name} {self.url} busy={self.busy} idle={len(self._idle)}>"

    def request(
        self, method: bytes, path: bytes, headers: Headers, body: bytes, connect: float, until: float | None = None
    ) -> _Request:
        """`async with` sends the request and gives its answer once the head has come, by `until` in the loop's time.
        Raises LegFailure.

        Leaving the block before the body was read to its end closes the connection, which is what makes an engine stop
        working on the request. A reused connection that turns out to have been closed by the engine is tried once more
        on a new one: the engine never saw the request.
        """
        lines = b"".join([b"%b: %b\r\n" % pair for pair in headers])
        line = b"%b %b%b HTTP/1.1\r\n%b" % (method, self._prefix, path, self._host)
        return _Request(self, b"%bcontent-length: %d\r\n%b\r\n" % (line, len(body), lines), body, connect, until)

    async def close(self) -> None:
        """Drops the idle connections. Those in use end with their requests."""
        for connection in self._idle:
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # lets the loop run the connections' last callbacks

    def reuse(self, now: float) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()  # the latest, so that the surplus of a burst ages and goes
            if not connection.closed and connection.idle_since > now - IDLE_LIMIT:
                return connection
            connection.abort()
        return None

    async def connect(self, loop: asyncio.AbstractEventLoop, wait: float) -> _Connection:
        if self._watch is None or self._watch.loop is not loop:
            self._watch = Watch(loop)
        connection = _Connection(self._watch)
        try:
            async with asyncio.timeout(wait):
                await loop.create_connection(lambda: connection, *self._address, ssl=self._tls)
        except BaseException as exc:
            connection.disown()  # cancelled when it has just been made, its socket is closed and nobody is told
            if isinstance(exc, TimeoutError):
                raise LegFailure(504, f"no connection within {wait:g} s", self.name, "connect") from exc
            if isinstance(exc, OSError):
                raise LegFailure(502, f"no connection ({exc.strerror or exc})", self.name, "connect") from exc
            raise
        return connection

    def give_back(self, connection: _Connection, now: float) -> None:
        if connection.reusable:
            connection.idle_since = now
            self._idle.append(connection)
            while self._idle[0].closed or self._idle[0].idle_since <= now - IDLE_LIMIT:
                self._idle.popleft().abort()  # the surplus of a burst, which nobody takes as long as there are newer ones
        else:
            connection.abort()


class _Request:
    """One request on its way; see Upstream.request."""

    __slots__ = ("_body", "_connect", "_connection", "_head", "_loop", "_until", "_upstream")

    def __init__(self, upstream: Upstream, head: bytes, body: bytes, connect: float, until: float | None) -> None:
        self._upstream, self._head, self._body, self._connect, self._until = upstream, head, body, connect, until
        self._connection: _Connection | None = None

    async def __aenter__(self) -> Answer:
        upstream = self._upstream
        if upstream.busy >= upstream.max_connections:
            raise LegFailure(503, f"{upstream.max_connections} requests are already open", upstream.name, "connect")
        self._loop = loop = asyncio.get_running_loop()
        upstream.busy += 1
        try:
            connection = upstream.reuse(loop.time()) or await upstream.connect(loop, self._connect)
            self._connection = connection
            reused = connection.used
            connection.start(self._head, self._body)
            try:
                await connection.head(self._until)
            except _Broken as exc:
                if not (reused and exc.silent):
                    raise
                self._connection = None
                self._connection = connection = await upstream.connect(loop, self._connect)
                connection.start(self._head, self._body)
                await connection.head(self._until)
        except (TimeoutError, _Broken) as exc:
            self._leave()
            raise _failure(exc, upstream.name) from exc
        except BaseException:
            self._leave()
            raise
        return Answer(connection, upstream.name)

    async def __aexit__(self, *exc: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self._upstream.busy -= 1
        if self._connection is not None:
            self._upstream.give_back(self._connection, self._loop.time())


def _checked(name: str, url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        ok = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        ok = False
    if not ok:
        raise ConfigError(name, f"{url!r} is not an http:// or https:// URL", "Write it like http://127.0.0.1:8100.")
    return parts


def _failure(exc: TimeoutError | _Broken, instance: str) -> LegFailure:
    if isinstance(exc, _Broken):
        return LegFailure(502, str(exc), instance, "broken")
    return LegFailure(504, "it did not answer in time", instance, "timeout")

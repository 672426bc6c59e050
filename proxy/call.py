"""One request on a client's connection and the writing of its answer: what ASGI does, without its detours.

A head is held back until the first bytes of the body are there, and the end of a stream goes with its last event, so
that an answer that is ready at once costs one write to the socket. guard.py makes one of these for each request to an
engine's endpoint; uvicorn sees it as one of its request cycles, which is why some names here are uvicorn's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from pdserve import log
from pdserve.errors import RequestError

if TYPE_CHECKING:
    from pdserve.proxy.guard import Guarded

Headers = list[tuple[bytes, bytes]]
_NO_BODY: Final = (204, 304)
_log = log.get("proxy")


class ClientGone(Exception):
    """The client closed its connection before its request was complete."""


class _Unheard:
    """uvicorn sets an event on its cycles when something happens; here it calls `gone` and `feed`."""

    def set(self) -> None:
        pass


_UNHEARD: Final = _Unheard()


class Call:
    """Reads one request, writes one answer."""

    __slots__ = (
        "_chunked", "_error", "_head", "_lost", "_parts", "_protocol", "_size", "_task", "_waiter", "_whole", "came",
        "disconnected", "headers", "http_1_0", "keep_alive", "left", "message_event", "method", "path", "response_complete", "target",
    )  # fmt: skip

    def __init__(self, protocol: Guarded, method: bytes, path: str, target: bytes, headers: Headers) -> None:
        """`target` is path and query as the client wrote them."""
        self._protocol = protocol
        self.method, self.path, self.target, self.headers = method, path, target, headers
        self.keep_alive = True
        self.http_1_0 = False
        self.disconnected = self.response_complete = self.left = False
        self.came = time.perf_counter()
        self.message_event = _UNHEARD
        self._parts: list[bytes] = []
        self._size = 0
        self._whole = False
        self._lost = False  # what still comes of the body is dropped
        self._error: RequestError | None = None  # why, until it is raised
        self._waiter: asyncio.Future[None] | None = None
        self._task: asyncio.Task[Any] | None = None
        self._head = b""
        self._chunked = False

    # What the connection calls.

    async def run_asgi(self, endpoint: Callable[[Call], Awaitable[None]]) -> None:
        """The task of this request. The name is what uvicorn calls it by."""
        self._task = asyncio.current_task()
        try:
            await endpoint(self)
        except Exception:  # noqa: BLE001 - the last one who could tell of it
            _log.exception("%r: a bug in the proxy ended it", self)
        finally:
            self._task = None
            if not self.response_complete and not self.disconnected:
                self._protocol.transport.abort()  # nobody is left who would write the rest

    def feed(self, data: bytes, limit: int) -> None:
        """More of the body."""
        if self._lost:
            return
        self._size += len(data)
        if self._size > limit:
            return self.too_large(limit)
        self._parts.append(data)

    def too_large(self, limit: int) -> None:
        text = f"The request body is larger than {limit} bytes (--max-body-mib)."
        self.fail(RequestError(413, text, code="body_too_large"))

    def fail(self, error: RequestError) -> None:
        """The body will not be had."""
        self._error, self._lost = error, True
        self._parts.clear()
        self._wake()

    def complete(self) -> None:
        """The body is there."""
        self._whole = True
        self._wake()

    def gone(self) -> None:
        """The client has left: whatever is done for it ends."""
        self.disconnected = True
        if self._task is not None and not self.response_complete:
            self.left = True
            self._task.cancel()

    # What the endpoint calls.

    async def body(self, within: float) -> bytes:
        """The whole body. Raises RequestError or ClientGone."""
        if not self._whole and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(within):
                    await self._waiter
            except TimeoutError as exc:
                text = f"The request body did not arrive within {within:g} s (--receive-timeout)."
                raise RequestError(408, text, "timeout_error") from exc
            finally:
                self._waiter = None
        if self.disconnected:
            raise ClientGone
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # raised, it holds this call's frame: a circle
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def has_left(self) -> bool:
        """Asked when the task was cancelled: because of the client? Then the cancelling is over with."""
        return self.left and self._task is not None and self._task.uncancel() == 0

    def start(self, status: int, headers: Headers) -> None:
        """Status and headers; they leave with the first bytes of the body."""
        lines = [STATUS_LINE[status]]
        bare = self.method == b"HEAD" or status in _NO_BODY
        counted = bare
        for name, value in (*self._protocol.server_state.default_headers, *headers):
            counted = counted or name == b"content-length"
            lines += (name, b": ", value, b"\r\n")
        if not counted:
            self._chunked = not self.http_1_0
            if self._chunked:
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                self.keep_alive = False  # its end is the end of the connection
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        self._head = b"".join(lines)

    def write(self, data: bytes, last: bool = False) -> None:
        """More of the body, and whether that was all."""
        if self.response_complete:
            raise RuntimeError("the answer is complete already")
        if not self.disconnected:
            if self._chunked:
                end = b"\r\n0\r\n\r\n" if last else b"\r\n"
                data = b"%b%x\r\n%b%b" % (self._head, len(data), data, end) if data else self._head + end[2:]
            elif self._head:
                data = self._head if self.method == b"HEAD" else self._head + data
            self._head = b""
            if data:
                self._protocol.transport.write(data)
        if last:
            self.response_complete = True
            self._protocol.answered(self)

    @property
    def paused(self) -> bool:
        """The client reads more slowly than it is written to."""
        return self._protocol.flow.write_paused and not self.disconnected

    def abort(self) -> None:
        """Gives the client up: nothing is written any more, and what waits to be is dropped."""
        self.disconnected = True
        self._protocol.transport.abort()

    async def drained(self) -> None:
        await self._protocol.flow.drain()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __repr__(self) -> str:
        return f"<Call {self.path} {'answered' if self.response_complete else 'open'}>"

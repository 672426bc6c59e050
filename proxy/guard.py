"""The server's connections, guarded: how many there may be, how long a head may take and how large it may be; and which
of their requests go straight to an endpoint.

uvicorn bounds none of the three: a client could open connections and say nothing, or say headers for ever. The body and
the reading of the answer have their own bounds (call.Call.body, relay.Client).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast
from urllib.parse import unquote_to_bytes

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pdserve.proxy import openai
from pdserve.proxy.call import Call
from pdserve.proxy.turns import Turns

_REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}
LINGER = 0.5  # seconds that an idle connection is left open when the server stops
Endpoint = Callable[[Call], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one connection, and how many there may be."""

    head: int = 64 * 1024
    head_time: float = 30.0
    connections: int = 20_000
    body: int = 64 * 1024 * 1024


class Guarded(HttpToolsProtocol):
    """Between requests a connection is uvicorn's to close (timeout_keep_alive); before the first, ours."""

    limits: ClassVar[Limits]
    front: ClassVar[Mapping[tuple[bytes, bytes], Endpoint]]  # by method and path; all else is the ASGI app's
    turns: ClassVar[Turns]

    _head = 0  # bytes of the head that is being received
    _in_head = True
    _timer: asyncio.TimerHandle | None = None
    _idle_timer: asyncio.TimerHandle | None = None
    _idle_since = 0.0
    _leaving = False  # the server stops
    _fresh: tuple[Call, Endpoint] | None = None  # the request whose head has just come

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(503, f"{self.limits.connections} connections are open, which is the limit (--max-connections).")
            return
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        calls = [self.cycle, *(cycle for cycle, _ in self.pipeline)]
        super().connection_lost(exc)
        for call in calls:
            if isinstance(call, Call):
                call.gone()
        self.cycle = cast(Any, None)  # it holds this connection: what is in no circle goes at once
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head += len(data)
        super().data_received(data)
        if self._fresh is not None:
            (call, endpoint), self._fresh = self._fresh, None
            self.turns.begin(self.loop, partial(self._start_asgi_task, cast(Any, call), cast(Any, endpoint)))
        # What came with the head of its body is counted too, which is why only an unfinished head is judged.
        if self._in_head and self._head and not self.transport.is_closing():
            if self._head > self.limits.head:
                self._refuse(431, f"The head of the request is larger than {self.limits.head} bytes (--max-head-kib).")
            elif self._timer is None:
                self._start_timer()

    def shutdown(self) -> None:
        """The server stops. A request may be on its way to a connection that carries none, and would be lost without a
        word if it were closed at once: it gets a moment, and whatever comes is still answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        elif not self._leaving:
            self._leaving = True
            self.loop.call_later(LINGER, self._part)

    def _part(self) -> None:
        if not self._in_head or self._head or (self.cycle is not None and not self.cycle.response_complete):
            return  # something came; it is the last
        self.transport.close()

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._in_head = True
        self.url, self.headers = b"", []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        self._in_head, self._head = False, 0
        self._stop_timer()
        method, target = self.parser.get_method(), plain(self.url)
        path = target.partition(b"?")[0]
        endpoint = self.front.get((method, path))
        if endpoint is None:
            return self._to_the_app()
        call = Call(self, method, path.decode(), target, self.headers)
        call.http_1_0 = self.parser.get_http_version() == "1.0"
        call.keep_alive = not (call.http_1_0 or self._leaving) and self.parser.should_keep_alive()
        before, self.cycle = self.cycle, cast(Any, call)
        if declared(self.headers) > self.limits.body:
            call.too_large(self.limits.body)  # now, not when so much of it has been kept; what still comes is dropped
            call.keep_alive = call.keep_alive and not self.expect_100_continue  # whether it comes is the client's choice
        elif self.expect_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if before is None or before.response_complete:
            self._fresh = (call, endpoint)
        else:  # it was sent before the answer to the one before it was complete
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, cast(Any, endpoint)))

    def on_body(self, body: bytes) -> None:
        if isinstance(call := self.cycle, Call):
            if not call.response_complete:
                call.feed(body, self.limits.body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if isinstance(call := self.cycle, Call):
            call.complete()
        else:
            super().on_message_complete()
        self._in_head, self._head = True, 0

    def _to_the_app(self) -> None:
        """As uvicorn does it; the scope that it makes at the beginning of each message is made only now."""
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers.extend(headers)
        super().on_headers_complete()
        if self._leaving:
            self.cycle.keep_alive = False

    # What a call and the timers call.

    def answered(self, call: Call) -> None:
        """The answer to `call` is written; the next request of this connection may begin."""
        if not call.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        """As uvicorn does it, but for its timer, which it sets and cancels for each request."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._look_idle)

    def _look_idle(self) -> None:
        self._idle_timer = None
        if self._head or (self.cycle is not None and not self.cycle.response_complete):
            return  # the end of the next answer begins anew
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._idle_timer = self.loop.call_later(left, self._look_idle)
        else:
            self.timeout_keep_alive_handler()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.limits.head_time, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._refuse(408, f"The head of the request did not arrive within {self.limits.head_time:g} s (--head-timeout).")

    def _refuse(self, status: int, message: str) -> None:
        body = openai.error_json(status, message, "service_unavailable" if status == 503 else None)
        line = f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\n"
        head = f"{line}content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


def declared(headers: list[tuple[bytes, bytes]]) -> int:
    """How large the body will be; 0 where that is not said. (The parser lets nothing but a number through.)"""
    for name, value in headers:
        if name == b"content-length":
            return int(value)
    return 0


def plain(url: bytes) -> bytes:
    """Path and query as they are usually written: without a host in front, the path without escapes."""
    if url.startswith(b"/") and b"%" not in url:
        return url
    parts = httptools.parse_url(url)
    path = unquote_to_bytes(parts.path or b"/")
    return path + b"?" + parts.query if parts.query else path


def guarded(limits_: Limits, front_: Mapping[tuple[bytes, bytes], Endpoint]) -> type[asyncio.Protocol]:
    """A protocol class with these limits and endpoints, to be given to uvicorn."""

    class Bound(Guarded):
        limits = limits_
        front = front_
        turns = Turns()

    return Bound

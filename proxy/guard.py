"""The server's connections, guarded: how many there may be, how long a head may take and how large it may be.

uvicorn bounds none of the three: a client could open connections and say nothing, or say headers for ever. The body and
the reading of the answer have their own bounds (app.read_body, relay.Client).
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pdserve.proxy import openai

_REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}


def guarded(max_head: int, head_time: float, max_connections: int) -> type[asyncio.Protocol]:
    """A protocol class with these limits, to be given to uvicorn."""

    class Guarded(HttpToolsProtocol):
        """Between requests a connection is uvicorn's to close (timeout_keep_alive); before the first, ours."""

        _head = 0  # bytes of the head that is being received
        _in_head = True
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                self._refuse(503, f"{max_connections} connections are open, which is the limit.")
                return
            self._start_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._in_head:
                self._head += len(data)
                if self._timer is None:
                    self._start_timer()
            super().data_received(data)
            # What came with the head of its body is counted too, which is why only an unfinished head is judged.
            if self._in_head and self._head > max_head and not self.transport.is_closing():
                self._refuse(431, f"The head of the request is larger than {max_head} bytes.")

        def on_message_begin(self) -> None:
            self._in_head = True
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._in_head, self._head = False, 0
            self._stop_timer()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._in_head, self._head = True, 0

        def _start_timer(self) -> None:
            self._timer = self.loop.call_later(head_time, self._late)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _late(self) -> None:
            self._timer = None
            if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
                self._refuse(408, f"The head of the request did not arrive within {head_time:g} s.")

        def _refuse(self, status: int, message: str) -> None:
            body = openai.error_json(status, message)
            line = f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\n"
            head = f"{line}content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
            self.transport.close()

    return Guarded

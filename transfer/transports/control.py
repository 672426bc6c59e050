"""The way of the small messages over TCP: frames of 4 bytes of length and a message, on the loop, never behind bulk."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, cast

from pdserve.errors import ProtocolError
from pdserve.transfer.transports.base import TransportError
from pdserve.transfer.transports.messages import MAX_MESSAGE
from pdserve.transfer.transports.tls import TlsPipe

if TYPE_CHECKING:
    from pdserve.transfer.transports.session import Session

_LENGTH = 4
#: for the last words to reach a peer that hardly reads
_FLUSH_S = 2.0


class Control(asyncio.Protocol):
    """Implements session.Channel. Set `session` before open()."""

    session: Session

    def __init__(self, pipe: TlsPipe | None) -> None:
        self._pipe = pipe
        self._buffer = bytearray()
        self._early = bytearray()  # said before the transport was there
        self._transport: asyncio.Transport | None = None

    async def open(self, sock: socket.socket) -> None:
        """Takes the socket over."""
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().create_connection(lambda: self, sock=sock)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class is not one of asyncio's
        if self._early:
            self._transport.write(bytes(self._early))
            self._early.clear()
        if self._pipe is not None:
            self._take(b"")  # what the handshake read too far

    def data_received(self, data: bytes) -> None:
        if self._pipe is None and not self._buffer and int.from_bytes(data[:_LENGTH], "little") + _LENGTH == len(data):
            self.session.received(memoryview(data)[_LENGTH:])  # as nearly always: one message and nothing else
        else:
            self._take(data)

    def _take(self, data: bytes) -> None:
        try:
            if self._pipe is None:
                self._buffer += data
            else:
                self._pipe.feed(data)
                while plain := self._pipe.read():
                    self._buffer += plain
            self._deliver()
        except (ProtocolError, TransportError) as e:
            self.session.lost(f"broke the protocol: {e}")

    def _deliver(self) -> None:
        buffer, start = self._buffer, 0
        while len(buffer) - start >= _LENGTH:
            length = int.from_bytes(buffer[start : start + _LENGTH], "little")
            if length > MAX_MESSAGE:
                raise ProtocolError(f"a message of {length} bytes; at most {MAX_MESSAGE}")
            end = start + _LENGTH + length
            if len(buffer) < end:
                break
            self.session.received(bytes(buffer[start + _LENGTH : end]))
            start = end
            if self.session.closed:
                break
        if start:
            del buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        self.session.lost(f"the peer hung up: {exc}" if exc else "the peer hung up")

    def send(self, data: bytes) -> None:
        framed = len(data).to_bytes(_LENGTH, "little") + data
        if self._pipe is not None:
            framed = self._pipe.encrypt(framed)
        if self._transport is None:
            self._early += framed
        elif not self._transport.is_closing():
            self._transport.write(framed)

    def backlog(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()  # after what is still to be written
            asyncio.get_running_loop().call_later(_FLUSH_S, self._transport.abort)

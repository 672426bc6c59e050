"""One engine process at the daemon's socket."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pdserve.errors import ProtocolError
from pdserve.transfer import wire

if TYPE_CHECKING:
    from pdserve.transfer.daemon import Daemon

HELLO_S = 5.0
#: a client that does not read its answers is let go before it fills our memory
MAX_UNSENT = 32 << 20


class Connection(asyncio.Protocol):
    """One engine process. Its end releases all that it held."""

    def __init__(self, daemon: Daemon, client: int) -> None:
        self._daemon, self.client, self.label = daemon, client, "?"
        self._reader = wire.FrameReader()
        self._greeted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._hello_timer = asyncio.get_running_loop().call_later(HELLO_S, self._late)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._reader.feed(data):
                self._handle(wire.decode_request(frame))
        except ProtocolError as e:
            self._daemon.log.warning("client %s refused: %s", self.label, e)
            self._transport.write(wire.encode(wire.Refused(0, str(e))))
            self._transport.close()

    def _handle(self, message: wire.Request) -> None:
        if self._transport.is_closing():
            return
        if isinstance(message, wire.Hello):
            self._greet(message)
        elif not self._greeted:
            raise ProtocolError("the first message must be a greeting")
        elif isinstance(message, wire.Facts):  # told in passing: no answer
            self._daemon.requests.take(message, self.label.partition("/")[0])
        else:
            self._transport.write(wire.encode(self._daemon.answer(message, self.client)))
            if self._transport.get_write_buffer_size() > MAX_UNSENT:
                self._daemon.log.warning("client %s does not read its answers: closed", self.label)
                self._transport.abort()

    def _greet(self, message: wire.Hello) -> None:
        if message.version != wire.VERSION:
            raise ProtocolError(
                f"this daemon speaks protocol version {wire.VERSION}, the client {message.version}: install the same pdserve on both sides"
            )
        self._hello_timer.cancel()
        self._greeted = True
        self.label = f"{message.name} (pid {message.pid})"
        self._daemon.clients[self.client] = self
        self._daemon.log.info("client %s connected", self.label)
        self._transport.write(wire.encode(self._daemon.welcome()))

    def abort(self) -> None:
        self._transport.abort()

    def _late(self) -> None:
        if not self._greeted:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._hello_timer.cancel()
        self._daemon.clients.pop(self.client, None)
        self._daemon.store.client_gone(self.client)
        if self._greeted:
            self._daemon.log.info("client %s left", self.label)

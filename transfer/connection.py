"""One engine process at the daemon's socket."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from pdserve.errors import ProtocolError
from pdserve.transfer import wire

if TYPE_CHECKING:
    from pdserve.transfer.daemon import Daemon

HELLO_S = 5.0
#: a client that does not read its answers is let go before it fills our memory
MAX_UNSENT = 32 << 20
#: a long request is carried out in parts of so many chunks, and others have their turn when so much time has passed: in a
#: full arena a chunk takes 15 to 50 us
A_PART, A_TURN_S = 16, 0.00015


class Connection(asyncio.Protocol):
    """One engine process. Its end releases all that it held."""

    def __init__(self, daemon: Daemon, client: int) -> None:
        self._daemon, self.client, self.label = daemon, client, "?"
        self._reader = wire.FrameReader()
        self._greeted = False
        self._frames: deque[bytes] = deque()  # not looked at yet
        #: a long request under way: what is left of it, what was answered so far
        self._left: deque[wire.Request] = deque()
        self._answers: list[wire.Reply] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._hello_timer = asyncio.get_running_loop().call_later(HELLO_S, self._late)

    def data_received(self, data: bytes) -> None:
        try:
            self._frames.extend(self._reader.feed(data))
            self._go_on()
        except ProtocolError as e:
            self._refuse(e)

    def _go_on(self) -> None:
        while self._frames and not self._left:
            self._handle(wire.decode_request(self._frames.popleft()))

    def _refuse(self, e: ProtocolError) -> None:
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
        elif len(parts := _parts(message)) > 1:
            self._left.extend(parts)
            self._take_turn()
        else:
            self._send(self._daemon.answer(message, self.client))

    def _take_turn(self) -> None:
        """Parts of a long request, as many as the time allows."""
        ends = time.perf_counter() + A_TURN_S
        while self._left:
            self._answers.append(self._daemon.answer(self._left.popleft(), self.client))
            if self._left and time.perf_counter() > ends:
                self._transport.pause_reading()  # what this client asks next comes after it
                asyncio.get_running_loop().call_soon(self._next_turn)
                return
        answers, self._answers = self._answers, []
        self._send(_together(answers))

    def _next_turn(self) -> None:
        """Others have had theirs."""
        if self._transport.is_closing():  # what was reserved so far has been given back
            self._left.clear()
            return
        try:
            self._take_turn()
            if not self._left and not self._transport.is_closing():
                self._transport.resume_reading()
            self._go_on()
        except ProtocolError as e:
            self._refuse(e)
        except Exception:
            self._transport.abort()  # as the loop does where data_received() fails; the client would wait for nothing
            raise

    def _send(self, reply: wire.Reply) -> None:
        self._transport.write(wire.encode(reply))
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


def _parts(message: wire.Request) -> list[wire.Request]:
    """The message, in pieces if it is a long one."""
    if not isinstance(message, wire.Reserve | wire.Commit) or len(message.items) <= A_PART:
        return [message]
    starts = range(0, len(message.items), A_PART)
    return [msgspec.structs.replace(message, items=message.items[at : at + A_PART]) for at in starts]


def _together(answers: list[wire.Reply]) -> wire.Reply:
    """One answer, of those to its parts."""
    first = answers[0]
    if isinstance(first, wire.ReserveReply):
        grants = [grant for answer in answers if isinstance(answer, wire.ReserveReply) for grant in answer.grants]
        return wire.ReserveReply(first.id, grants)
    assert isinstance(first, wire.Ok)
    return wire.Ok(first.id, sum(answer.count for answer in answers if isinstance(answer, wire.Ok)))

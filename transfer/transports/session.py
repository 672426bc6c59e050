"""One connection's common part, whatever moves its bytes: calls, offers and grants, tickets, credit, deadlines, the end.

Lives on the loop. Below it lie two ways to the peer: a Channel for the small messages, and a Plane that takes segments out of
the outbox and puts arriving bytes where the ledger says. Planes work on threads; finished() and consumed() are theirs to call.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from pdserve import log
from pdserve.errors import ProtocolError
from pdserve.transfer.transports import messages as m
from pdserve.transfer.transports.base import (
    MAX_CALL,
    MAX_PIECES,
    DeadlinePassed,
    Expected,
    Local,
    Offer,
    Outcome,
    PeerLost,
    PeerRefused,
    Piece,
    Service,
    Slot,
    TransportError,
)
from pdserve.transfer.transports.ledger import Ledger
from pdserve.transfer.transports.outbox import Outbox
from pdserve.transfer.transports.plane import Channel, Limits, Plane
from pdserve.transfer.transports.pushes import Pushes, wake

#: how often deadlines of lent slots and the peer's silence are looked at
_TICK_S = 0.25
_ALIVE_S = 3.0
#: calls of the peer that we work on at a time
_MAX_RUNNING = 256
#: control bytes that the peer has not taken yet, beyond which it is given up
_MAX_BACKLOG = 32 << 20


class Session:
    """Implements base.Connection."""

    def __init__(
        self,
        channel: Channel,
        plane: Plane,
        service: Service,
        local: Local,
        limits: Limits,
        peer: str,
        address: str,
        *,
        credit: int = 0,
    ) -> None:
        """`credit`: bytes that the peer takes at a time; 0: as many as we."""
        self.peer, self.address, self.closed = peer, address, False
        self.local, self.limits = local, limits
        self.loop = asyncio.get_running_loop()
        self._channel, self.plane, self._service = channel, plane, service
        self.ledger = Ledger(local.arena, self._finished, verify=limits.verify)
        credit = credit or limits.window_bytes
        self.outbox = Outbox(min(limits.segment_bytes, credit // 4), credit)
        self._pushes = Pushes(self, self.outbox)
        #: what names this session between the two, for further streams
        self.token = b""
        self._log = log.get("transport")
        self._next_id = 0
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._over: deque[tuple[Slot, Outcome]] = deque()
        self._posted = False
        self._uncredited = 0
        self._counting = threading.Lock()
        self._heard = self._said = time.monotonic()
        self._ending: asyncio.Task[None] | None = None
        self.reason = ""
        self.on_closed: Callable[[Session], None] = lambda session: None
        self._ticker = self.loop.call_later(_TICK_S, self._tick)

    def __repr__(self) -> str:
        state = f"closed: {self.reason}" if self.closed else f"{len(self.ledger)} tickets, {len(self._pushes)} outgoing"
        return f"<Session {self.peer} {self.address} [{state}]>"

    def start(self) -> None:
        self.plane.start(self)

    # ---- base.Connection ----

    async def call(self, payload: bytes, deadline: float) -> bytes:
        if len(payload) > MAX_CALL:
            raise ProtocolError(f"a call of {len(payload)} bytes; at most {MAX_CALL}")
        reply: bytes = await self.ask(lambda id_, left: m.Call(id_, payload, left), deadline, "the call")
        return reply

    async def push(self, pieces: Sequence[Piece], deadline: float) -> list[Outcome]:
        return await self._pushes.push(pieces, deadline)

    def expect(self, expected: Sequence[Expected], deadline: float) -> list[int]:
        self.must_live()
        tickets = []
        try:
            for item in expected:
                tickets.append(self._lend(item, deadline))
        except ProtocolError:
            self._end(tickets, Outcome("cancelled", "the others could not be lent"))
            raise
        return tickets

    def cancel(self, slots: Sequence[Slot], reason: str) -> None:
        self._end([slot.ticket for slot in slots], Outcome("cancelled", reason))

    def stats(self) -> dict[str, int | float | str]:
        return {
            "peer": self.peer,
            "open_tickets": len(self.ledger),
            "credit_bytes": self.outbox.credit,
            "queued_bytes": self.outbox.queued_bytes,
            **self.plane.stats(),
        }

    async def close(self, reason: str = "closed") -> None:
        if not self.closed:
            self.say(m.Bye(m.clipped(reason)))
        self.lost(reason)
        assert self._ending is not None
        await asyncio.shield(self._ending)

    # ---- asking ----

    async def ask(self, build: Callable[[int, float], m.Message], deadline: float, what: str) -> Any:
        self.must_live()
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlinePassed(f"{self.peer}: {what} had no time left")
        self._next_id += 1
        id_, answer = self._next_id, self.loop.create_future()
        self._answers[id_] = answer
        self.say(build(id_, left))
        timer = self.loop.call_later(left, wake, answer)
        try:
            reply = await answer
        finally:
            timer.cancel()
            self._answers.pop(id_, None)
        if reply is None:
            raise DeadlinePassed(f"{self.peer}: no answer to {what} within {left:.1f} s")
        return reply

    def must_live(self) -> None:
        if self.closed:
            raise PeerLost(f"{self.peer}: {self.reason}")

    # ---- what comes in ----

    def received(self, data: bytes | memoryview) -> None:
        """One control message, from the channel."""
        self._heard = time.monotonic()
        try:
            self._handle(m.decode(data))
        except ProtocolError as e:
            self.lost(f"sent what it must not: {e}")

    def _handle(self, message: m.Message) -> None:
        match message:
            case m.Call():
                self._on_call(message)
            case m.Reply():
                self.answer(message.id, message.payload)
            case m.Grants():
                self._pushes.on_grants(message)
            case m.Failed():
                self.answer(message.id, PeerRefused(f"{self.peer}: {message.reason}"))
            case m.Landed():
                self._pushes.on_landed(message)
            case m.Credit():
                self.outbox.add_credit(message.bytes)
            case m.Offers():
                self._on_offers(message)
            case m.Abandon():
                self._end(message.tickets, Outcome("late" if message.late else "cancelled", message.reason))
            case m.ForPlane():
                self.plane.message(message.payload)
            case m.Bye():
                self.lost(f"the peer closed the connection: {message.reason}")
            case m.Alive():
                pass

    def answer(self, id_: int, answer: Any) -> None:
        future = self._answers.pop(id_, None)
        if future is None or future.done():
            return
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _on_call(self, message: m.Call) -> None:
        if len(self._running) >= _MAX_RUNNING:
            self.say(m.Failed(message.id, f"{_MAX_RUNNING} calls are being worked on already"))
            return
        task = self.loop.create_task(self._serve(message))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _serve(self, message: m.Call) -> None:
        try:
            reply = await self._service.call(self, message.payload)
            if len(reply) > MAX_CALL:
                raise ProtocolError(f"the answer has {len(reply)} bytes; at most {MAX_CALL}")
        except Exception as e:  # noqa: BLE001 - the service's errors are the peer's to hear
            if not isinstance(e, TransportError | ProtocolError):
                self._log.warning("a call of %s failed: %r", self.peer, e)
            self.say(m.Failed(message.id, m.clipped(str(e) or type(e).__name__)))
        else:
            self.say(m.Reply(message.id, reply))

    def _on_offers(self, message: m.Offers) -> None:
        offers = [Offer(i.key, i.shard, i.length, i.digest, i.meta) for i in message.items]
        try:
            slots = self._service.reserve(self, offers)
        except Exception as e:  # noqa: BLE001 - must not end the loop's handling of this peer
            self._log.error("reserving for %s failed: %r", self.peer, e)
            self.say(m.Failed(message.id, m.clipped(f"reserving failed: {e}")))
            return
        deadline = time.monotonic() + message.seconds
        tickets, refusals = [], []
        for offer, slot in zip(offers, slots, strict=True):
            if isinstance(slot, str):
                tickets.append(0)
                refusals.append(m.clipped(slot))
                continue
            try:
                assert slot.length == offer.length, f"a slot of {slot.length} bytes for a piece of {offer.length}"
                tickets.append(self._lend(Expected(offer.key, offer.shard, offer.digest, slot), deadline))
            except ProtocolError as e:
                tickets.append(0)
                refusals.append(str(e))
                self._service.done(self, slot, Outcome("refused", str(e)))
        self.say(m.Grants(message.id, tickets, refusals))

    # ---- lent slots ----

    def _lend(self, expected: Expected, deadline: float) -> int:
        ticket = self.ledger.lend(expected.slot, expected.key, expected.shard, expected.digest, deadline)
        self.plane.lent(ticket, expected)
        return ticket

    def _end(self, tickets: list[int], outcome: Outcome) -> None:
        self.ledger.end(tickets, outcome)
        self.plane.unwanted(tickets)

    def _finished(self, slot: Slot, outcome: Outcome) -> None:
        """From the ledger, on any thread."""
        self._over.append((slot, outcome))
        if not self._posted:
            self._posted = True
            self.post(self._tell_finished)

    def _tell_finished(self) -> None:
        self._posted = False  # before looking: whoever comes now posts again
        items = []
        while self._over:
            slot, outcome = self._over.popleft()
            items.append(m.LandedItem(slot.ticket, outcome.state, m.clipped(outcome.reason)))
            try:
                self._service.done(self, slot, outcome)
            except Exception as e:  # noqa: BLE001 - the others must be told of theirs
                self._log.error("done() for a piece from %s failed: %r", self.peer, e)
        for start in range(0, len(items), MAX_PIECES):
            self.say(m.Landed(items[start : start + MAX_PIECES]))

    # ---- for planes, from any thread ----

    def post(self, function: Callable[..., object], *args: object) -> None:
        """Runs it on the loop; after the loop's end there is nobody left to tell."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *args)

    def consumed(self, size: int) -> None:
        """So many bytes have left the wire: the peer may send as many again. Told in large parts."""
        with self._counting:
            self._uncredited += size
            if self._uncredited * 8 < self.limits.window_bytes:
                return
            size, self._uncredited = self._uncredited, 0
        self.post(lambda: self.say(m.Credit(size)))

    def tell_plane(self, payload: bytes) -> None:
        """To the plane at the other end; on the loop."""
        self.say(m.ForPlane(payload))

    # ---- the end ----

    def say(self, message: m.Message) -> None:
        if self.closed:
            return
        self._said = time.monotonic()
        self._channel.send(m.encode(message))
        if self._channel.backlog() > _MAX_BACKLOG:
            self.lost("it does not read what it is told")

    def _tick(self) -> None:
        if self.closed:
            return
        now = time.monotonic()
        if late := self.ledger.expired(now):
            self._end(late, Outcome("late", "the bytes did not come in time"))
        if now - self._said > _ALIVE_S:
            self.say(m.Alive())
        if now - self._heard > self.limits.silence_s:
            self.lost(f"nothing was heard of it for {self.limits.silence_s:.0f} s")
            return
        self._ticker = self.loop.call_later(_TICK_S, self._tick)

    def lost(self, reason: str) -> None:
        """The connection is over; on the loop. Safe to call twice."""
        if self.closed:
            return
        self.closed, self.reason = True, reason
        self._ending = self.loop.create_task(self._finish(reason))

    async def _finish(self, reason: str) -> None:
        self._ticker.cancel()
        self.outbox.close()
        self._channel.close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(PeerLost(f"{self.peer}: {reason}"))
        self._pushes.wake()
        for task in self._running:
            task.cancel()
        self.ledger.close(Outcome("lost", reason))
        await self.plane.close()
        self._tell_finished()
        assert not len(self.ledger), "a slot is still lent although no thread is left"
        if self._running:
            await asyncio.wait(self._running, timeout=5)
        try:
            self._service.closed(self, reason)
        except Exception as e:  # noqa: BLE001 - nothing is left to be saved here
            self._log.error("closed() for %s failed: %r", self.peer, e)
        self.on_closed(self)

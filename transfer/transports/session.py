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
from dataclasses import dataclass
from typing import Any, Protocol

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
from pdserve.transfer.transports.outbox import Outbox, Parcel

#: how often deadlines of lent slots and the peer's silence are looked at
_TICK_S = 0.25
_ALIVE_S = 3.0
#: calls of the peer that we work on at a time
_MAX_RUNNING = 256
#: control bytes that the peer has not taken yet, beyond which it is given up
_MAX_BACKLOG = 32 << 20
#: what a sending thread gets to let go of the arena before its stream is cut
_LET_GO_S = 1.0


@dataclass(frozen=True)
class Limits:
    """What bounds one connection; the registry reads them from the URL's query."""

    #: pieces are cut into parts of so many bytes, which may take different streams
    segment_bytes: int = 4 << 20
    #: bytes under way to us at most: the credit that the peer starts with
    window_bytes: int = 64 << 20
    #: whether arrived pieces are compared with their digest before done() says "arrived"
    verify: bool = True
    #: a peer that says nothing for so long is lost
    silence_s: float = 20.0


class Channel(Protocol):
    """The way of the small messages; hands what comes to Session.received() and its end to Session.lost()."""

    def send(self, data: bytes) -> None: ...
    def backlog(self) -> int: ...
    def close(self) -> None: ...


class Plane(Protocol):
    """The way of the bytes."""

    def start(self, session: Session) -> None:
        """Begins to take from session.outbox and to fill what session.ledger says."""

    def message(self, payload: bytes) -> None:
        """What the plane at the other end said through session.tell_plane(). Raises ProtocolError."""

    def lent(self, ticket: int, expected: Expected) -> None:
        """A slot was lent. Only planes whose peer writes by itself care."""

    def unwanted(self, tickets: list[int]) -> None:
        """These have just been ended in the ledger. Only planes whose peer writes by itself care."""

    def interrupt(self) -> None:
        """A sender keeps the arena although its push is over: let go now, by cutting the way if need be."""

    async def close(self) -> None:
        """Returns when none of its threads is left, or will touch the arena."""

    def stats(self) -> dict[str, int | float | str]: ...


class _Push:
    """A push() under way."""

    def __init__(self, pieces: Sequence[Piece], loop: asyncio.AbstractEventLoop) -> None:
        self.pieces = pieces
        self.outcomes: list[Outcome | None] = [None] * len(pieces)
        self.left = len(pieces)
        self.done: asyncio.Future[None] = loop.create_future()
        self.tickets: dict[int, int] = {}
        self.offers: list[int] = []
        self.changed = asyncio.Event()
        self.parcel = Parcel(lambda: None)

    def settle(self, index: int, outcome: Outcome) -> None:
        if self.outcomes[index] is None:
            self.outcomes[index] = outcome
            self.left -= 1
            if not self.left and not self.done.done():
                self.done.set_result(None)

    def unsettled(self) -> list[int]:
        return [ticket for ticket, index in self.tickets.items() if self.outcomes[index] is None]


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
        #: what names this session between the two, for further streams
        self.token = b""
        self._log = log.get("transport")
        self._next_id = 0
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._outgoing: dict[int, _Push] = {}
        self._offered: dict[int, tuple[_Push, list[int]]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._over: deque[tuple[Slot, Outcome]] = deque()
        self._posted = False
        self._uncredited = 0
        self._counting = threading.Lock()
        self._heard = self._said = time.monotonic()
        self._ending: asyncio.Task[None] | None = None
        self._reason = ""
        self.on_closed: Callable[[Session], None] = lambda session: None
        self._ticker = self.loop.call_later(_TICK_S, self._tick)

    def __repr__(self) -> str:
        state = (
            f"closed: {self._reason}" if self.closed else f"{len(self.ledger)} tickets, {len(self._outgoing)} outgoing"
        )
        return f"<Session {self.peer} {self.address} [{state}]>"

    def start(self) -> None:
        self.plane.start(self)

    # ---- base.Connection ----

    async def call(self, payload: bytes, deadline: float) -> bytes:
        if len(payload) > MAX_CALL:
            raise ProtocolError(f"a call of {len(payload)} bytes; at most {MAX_CALL}")
        reply: bytes = await self._ask(lambda id_, left: m.Call(id_, payload, left), deadline, "the call")
        return reply

    async def push(self, pieces: Sequence[Piece], deadline: float) -> list[Outcome]:
        for piece in pieces:
            if piece.length <= 0 or piece.offset < 0 or piece.offset + piece.length > self.local.arena.size:
                raise ProtocolError(f"a piece of {piece.length} bytes at {piece.offset} is not in the arena")
        self._must_live()
        push = _Push(pieces, self.loop)
        push.parcel.idle = lambda: self.post(push.changed.set)
        try:
            await self._send_pieces(push, deadline)
        finally:
            await self._let_go(push)
        return [outcome or Outcome("lost", self._reason) for outcome in push.outcomes]

    def expect(self, expected: Sequence[Expected], deadline: float) -> list[int]:
        self._must_live()
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
            self._say(m.Bye(m.clipped(reason)))
        self.lost(reason)
        assert self._ending is not None
        await asyncio.shield(self._ending)

    # ---- sending ----

    async def _send_pieces(self, push: _Push, deadline: float) -> None:
        unoffered = [i for i, piece in enumerate(push.pieces) if not piece.ticket]
        self._promised(push, [(i, p.ticket) for i, p in enumerate(push.pieces) if p.ticket])
        for start in range(0, len(unoffered), MAX_PIECES):
            batch = unoffered[start : start + MAX_PIECES]
            await self._offer(push, batch, deadline)
        if not push.left:
            return
        timer = self.loop.call_later(max(0.0, deadline - time.monotonic()), _wake, push.done)
        try:
            await push.done
        finally:
            timer.cancel()
        if push.left and self.closed:
            raise PeerLost(f"{self.peer}: {self._reason}")
        if push.left:
            self._abandon(push, late=True, reason="the sender's deadline passed")
            for index in range(len(push.pieces)):
                push.settle(index, Outcome("late", "not all bytes were there before the deadline"))

    def _promised(self, push: _Push, granted: list[tuple[int, int]]) -> None:
        """Slots are there for these: their bytes may go."""
        for index, ticket in granted:
            if ticket in self._outgoing:
                raise ProtocolError(f"ticket {ticket} is in use already")
            self._outgoing[ticket] = push
            push.tickets[ticket] = index
        self.outbox.put([(ticket, push.pieces[index]) for index, ticket in granted], push.parcel)

    async def _offer(self, push: _Push, batch: list[int], deadline: float) -> None:
        items = [
            m.OfferItem(p.key, p.shard, p.length, p.digest, p.meta) for p in (push.pieces[index] for index in batch)
        ]

        def build(id_: int, left: float) -> m.Message:
            self._offered[id_] = push, batch
            push.offers.append(id_)
            return m.Offers(id_, items, left)

        await self._ask(build, deadline, "the offer")

    def _abandon(self, push: _Push, late: bool, reason: str) -> None:
        tickets = push.unsettled()
        self.outbox.withdraw(push.parcel)
        self._abandon_tickets(tickets, late, reason)

    def _abandon_tickets(self, tickets: list[int], late: bool, reason: str) -> None:
        for start in range(0, len(tickets), MAX_PIECES):
            self._say(m.Abandon(tickets[start : start + MAX_PIECES], late, reason))

    async def _let_go(self, push: _Push) -> None:
        """Waits, deaf to cancellation, until no thread reads the pieces any more."""
        for id_ in push.offers:
            self._offered.pop(id_, None)
        cancelled: asyncio.CancelledError | None = None
        if push.left:
            self._abandon(push, late=False, reason="the sender gave up")
        self.outbox.withdraw(push.parcel)  # also of what the receiver has ended, parts may still wait
        ends = time.monotonic() + _LET_GO_S
        while push.parcel.in_hand:
            push.changed.clear()
            if not push.parcel.in_hand:
                break
            if time.monotonic() > ends:
                ends = time.monotonic() + _LET_GO_S
                self.plane.interrupt()
            try:
                async with asyncio.timeout(0.2):
                    await push.changed.wait()
            except TimeoutError:
                continue
            except asyncio.CancelledError as e:
                cancelled = e
        for ticket in push.tickets:
            self._outgoing.pop(ticket, None)
        self.outbox.forget(list(push.tickets))
        if cancelled is not None:
            raise cancelled

    # ---- asking ----

    async def _ask(self, build: Callable[[int, float], m.Message], deadline: float, what: str) -> Any:
        self._must_live()
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlinePassed(f"{self.peer}: {what} had no time left")
        self._next_id += 1
        id_, answer = self._next_id, self.loop.create_future()
        self._answers[id_] = answer
        self._say(build(id_, left))
        timer = self.loop.call_later(left, _wake, answer)
        try:
            reply = await answer
        finally:
            timer.cancel()
            self._answers.pop(id_, None)
        if reply is None:
            raise DeadlinePassed(f"{self.peer}: no answer to {what} within {left:.1f} s")
        return reply

    def _must_live(self) -> None:
        if self.closed:
            raise PeerLost(f"{self.peer}: {self._reason}")

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
                self._answer(message.id, message.payload)
            case m.Grants():
                self._on_grants(message)
            case m.Failed():
                self._answer(message.id, PeerRefused(f"{self.peer}: {message.reason}"))
            case m.Landed():
                self._on_landed(message)
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

    def _answer(self, id_: int, answer: Any) -> None:
        future = self._answers.pop(id_, None)
        if future is None or future.done():
            return
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _on_grants(self, message: m.Grants) -> None:
        """Booked here and not where push() waits: between the two it may be cancelled, and then nobody would know of the slots."""
        push, batch = self._offered.pop(message.id, (None, []))
        if push is None:
            self._abandon_tickets([t for t in message.tickets if t], late=True, reason="the sender did not wait for it")
            return
        if len(message.tickets) != len(batch) or len(message.refusals) != message.tickets.count(0):
            raise ProtocolError(f"an offer of {len(batch)} pieces was answered with {len(message.tickets)} tickets")
        refusals = iter(message.refusals)
        for index, ticket in zip(batch, message.tickets, strict=True):
            if not ticket:
                push.settle(index, Outcome("refused", next(refusals)))
        self._promised(push, [(i, ticket) for i, ticket in zip(batch, message.tickets, strict=True) if ticket])
        self._answer(message.id, message)

    def _on_landed(self, message: m.Landed) -> None:
        unwanted = []
        for item in message.items:
            push = self._outgoing.get(item.ticket)
            if push is not None:
                if item.state != "arrived":
                    unwanted.append(item.ticket)
                push.settle(push.tickets[item.ticket], m.outcome(item))
        if unwanted:
            self.outbox.end(unwanted)

    def _on_call(self, message: m.Call) -> None:
        if len(self._running) >= _MAX_RUNNING:
            self._say(m.Failed(message.id, f"{_MAX_RUNNING} calls are being worked on already"))
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
            self._say(m.Failed(message.id, m.clipped(str(e) or type(e).__name__)))
        else:
            self._say(m.Reply(message.id, reply))

    def _on_offers(self, message: m.Offers) -> None:
        offers = [Offer(i.key, i.shard, i.length, i.digest, i.meta) for i in message.items]
        try:
            slots = self._service.reserve(self, offers)
        except Exception as e:  # noqa: BLE001 - must not end the loop's handling of this peer
            self._log.error("reserving for %s failed: %r", self.peer, e)
            self._say(m.Failed(message.id, m.clipped(f"reserving failed: {e}")))
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
        self._say(m.Grants(message.id, tickets, refusals))

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
            self._say(m.Landed(items[start : start + MAX_PIECES]))

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
        self.post(lambda: self._say(m.Credit(size)))

    def tell_plane(self, payload: bytes) -> None:
        """To the plane at the other end; on the loop."""
        self._say(m.ForPlane(payload))

    # ---- the end ----

    def _say(self, message: m.Message) -> None:
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
            self._say(m.Alive())
        if now - self._heard > self.limits.silence_s:
            self.lost(f"nothing was heard of it for {self.limits.silence_s:.0f} s")
            return
        self._ticker = self.loop.call_later(_TICK_S, self._tick)

    def lost(self, reason: str) -> None:
        """The connection is over; on the loop. Safe to call twice."""
        if self.closed:
            return
        self.closed, self._reason = True, reason
        self._ending = self.loop.create_task(self._finish(reason))

    async def _finish(self, reason: str) -> None:
        self._ticker.cancel()
        self.outbox.close()
        self._channel.close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(PeerLost(f"{self.peer}: {reason}"))
        for push in set(self._outgoing.values()):
            _wake(push.done)
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


def _wake(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_result(None)

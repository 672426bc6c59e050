"""What one end of a connection pushes: offers, the tickets they are granted, what became of each piece, and letting go of the arena.

Lives on the session's loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pdserve.errors import ProtocolError
from pdserve.transfer.transports import messages as m
from pdserve.transfer.transports.base import MAX_PIECES, Outcome, PeerLost, Piece
from pdserve.transfer.transports.outbox import Outbox, Parcel

if TYPE_CHECKING:
    from pdserve.transfer.transports.session import Session

#: what a sending thread gets to let go of the arena before its stream is cut
_LET_GO_S = 1.0


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


class Pushes:
    """The outgoing half of one session."""

    def __init__(self, session: Session, outbox: Outbox) -> None:
        self._session, self._outbox = session, outbox
        self._outgoing: dict[int, _Push] = {}
        self._offered: dict[int, tuple[_Push, list[int]]] = {}

    def __len__(self) -> int:
        """Pieces under way."""
        return len(self._outgoing)

    def wake(self) -> None:
        """The session is over: nobody waits any longer."""
        for push in set(self._outgoing.values()):
            wake(push.done)

    async def push(self, pieces: Sequence[Piece], deadline: float) -> list[Outcome]:
        for piece in pieces:
            if piece.length <= 0 or piece.offset < 0 or piece.offset + piece.length > self._session.local.arena.size:
                raise ProtocolError(f"a piece of {piece.length} bytes at {piece.offset} is not in the arena")
        self._session.must_live()
        push = _Push(pieces, self._session.loop)
        push.parcel.idle = lambda: self._session.post(push.changed.set)
        try:
            await self._send_pieces(push, deadline)
        finally:
            await self._let_go(push)
        return [outcome or Outcome("lost", self._session.reason) for outcome in push.outcomes]

    async def _send_pieces(self, push: _Push, deadline: float) -> None:
        unoffered = [i for i, piece in enumerate(push.pieces) if not piece.ticket]
        self._promised(push, [(i, p.ticket) for i, p in enumerate(push.pieces) if p.ticket])
        for start in range(0, len(unoffered), MAX_PIECES):
            batch = unoffered[start : start + MAX_PIECES]
            await self._offer(push, batch, deadline)
        if not push.left:
            return
        timer = self._session.loop.call_later(max(0.0, deadline - time.monotonic()), wake, push.done)
        try:
            await push.done
        finally:
            timer.cancel()
        if push.left and self._session.closed:
            raise PeerLost(f"{self._session.peer}: {self._session.reason}")
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
        self._outbox.put([(ticket, push.pieces[index]) for index, ticket in granted], push.parcel)

    async def _offer(self, push: _Push, batch: list[int], deadline: float) -> None:
        items = [
            m.OfferItem(p.key, p.shard, p.length, p.digest, p.meta) for p in (push.pieces[index] for index in batch)
        ]

        def build(id_: int, left: float) -> m.Message:
            self._offered[id_] = push, batch
            push.offers.append(id_)
            return m.Offers(id_, items, left)

        await self._session.ask(build, deadline, "the offer")

    def _abandon(self, push: _Push, late: bool, reason: str) -> None:
        tickets = push.unsettled()
        self._outbox.withdraw(push.parcel)
        self._abandon_tickets(tickets, late, reason)

    def _abandon_tickets(self, tickets: list[int], late: bool, reason: str) -> None:
        for start in range(0, len(tickets), MAX_PIECES):
            self._session.say(m.Abandon(tickets[start : start + MAX_PIECES], late, reason))

    async def _let_go(self, push: _Push) -> None:
        """Waits, deaf to cancellation, until no thread reads the pieces any more."""
        for id_ in push.offers:
            self._offered.pop(id_, None)
        cancelled: asyncio.CancelledError | None = None
        if push.left:
            self._abandon(push, late=False, reason="the sender gave up")
        self._outbox.withdraw(push.parcel)  # also of what the receiver has ended, parts may still wait
        ends = time.monotonic() + _LET_GO_S
        while push.parcel.in_hand:
            push.changed.clear()
            if not push.parcel.in_hand:
                break
            if time.monotonic() > ends:
                ends = time.monotonic() + _LET_GO_S
                self._session.plane.interrupt()
            try:
                async with asyncio.timeout(0.2):
                    await push.changed.wait()
            except TimeoutError:
                continue
            except asyncio.CancelledError as e:
                cancelled = e
        for ticket in push.tickets:
            self._outgoing.pop(ticket, None)
        self._outbox.forget(list(push.tickets))
        if cancelled is not None:
            raise cancelled

    # ---- what the receiver says ----

    def on_grants(self, message: m.Grants) -> None:
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
        self._session.answer(message.id, message)

    def on_landed(self, message: m.Landed) -> None:
        unwanted = []
        for item in message.items:
            push = self._outgoing.get(item.ticket)
            if push is not None:
                if item.state != "arrived":
                    unwanted.append(item.ticket)
                push.settle(push.tickets[item.ticket], m.outcome(item))
        if unwanted:
            self._outbox.end(unwanted)


def wake(future: asyncio.Future[None]) -> None:
    """Ends somebody's waiting for it."""
    if not future.done():
        future.set_result(None)

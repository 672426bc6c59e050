"""What moves chunks between two daemons: from one arena straight into the other, and small messages beside them.

    pieces of my arena --push--> [offer -> reserve -> ticket] -> segments -> slot in the other arena -> done()

A Transport is one daemon's end for one URL scheme. Both ends of a Connection are alike: whoever dialled, either may call and
push. Everything here belongs to the asyncio loop on which the transport was started: its methods are called there, and it
calls the Service there, so a Service needs no locks. The bytes move on threads of the transport's own.

Who owns memory, and when:
  * Sending. The bytes of a piece are read until push() returns or raises, and never after.
  * Receiving. A Slot is lent to the transport by Service.reserve() or Connection.expect(). From then on the transport may write
    into it at any moment, until it calls Service.done() for it: exactly once, whatever happens, also when the connection is lost.
    After done() no byte lands there any more, however late it comes in; only then may the space be given to somebody else.
    cancel() asks for that end to come soon; it does not bring it about by itself.

A ticket stands for one lent slot. It is a number that a connection uses once and never again, so bytes that come for an ended
ticket find nobody and are thrown away.

Every wait has a deadline: time.monotonic() seconds, as everywhere else in transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from pdserve.errors import CacheError

#: a whole conversation's chunks may be offered at once, but what is built from one message stays bounded
MAX_PIECES = 4096
MAX_META = 1024
#: of one call or reply
MAX_CALL = 1 << 20
#: lent slots that a connection may have open at a time
MAX_TICKETS = 65536


class TransportError(CacheError):
    """The peer cannot be used for this, now. Callers treat it as a miss; the breaker listens to these."""


class PeerUnreachable(TransportError):
    """Nobody listens there, or there is no way to it."""


class PeerRefused(TransportError):
    """The peer answered and said no, in words: version, secret, TLS, too many connections; or answered nonsense."""


class PeerLost(TransportError):
    """The connection ended while something was under way."""


class DeadlinePassed(TransportError):
    """It took longer than the caller was ready to wait."""


@dataclass(frozen=True)
class Piece:
    """One shard of a chunk, where it lies in our arena, for push()."""

    key: bytes
    shard: int
    offset: int
    length: int
    digest: int
    #: the slot in the other arena that was promised by a message of yours; 0: the transport asks the other Service for one
    ticket: int = 0
    #: whatever the other Service needs to reserve (parent, tokens, ...); opaque here
    meta: bytes = b""


@dataclass(frozen=True)
class Offer:
    """A piece that somebody wants to push to us."""

    key: bytes
    shard: int
    length: int
    digest: int
    meta: bytes


@dataclass(eq=False)
class Slot:
    """Space in our arena, lent to the transport until Service.done(). `context` is the lender's own."""

    offset: int
    length: int
    context: object = None
    #: set by the transport: what names this slot to the peer
    ticket: int = field(default=0, init=False)


@dataclass(frozen=True)
class Expected:
    """A slot for bytes that we have asked for by a message of our own; `digest` 0: not known, not compared."""

    key: bytes
    shard: int
    digest: int
    slot: Slot


State = Literal["arrived", "refused", "cancelled", "corrupt", "late", "lost"]


@dataclass(frozen=True)
class Outcome:
    """How it went with one piece; `reason` is a sentence unless it arrived."""

    state: State
    reason: str = ""

    @property
    def ok(self) -> bool:
        return self.state == "arrived"


ARRIVED = Outcome("arrived")


class Service(Protocol):
    """What a daemon does with its peers' wishes. Called on the loop; nothing here may block."""

    def connected(self, connection: Connection) -> None:
        """A peer has authenticated itself. Called for connections that it dialled, not for those of connect()."""

    def closed(self, connection: Connection, reason: str) -> None:
        """The connection is gone, and so are all its slots: done() was called for each before this."""

    async def call(self, connection: Connection, payload: bytes) -> bytes:
        """Answers a small message. What it raises reaches the caller as a PeerRefused with its text.

        Cancelled when the connection is lost. May itself await connection.call() or push().
        """

    def reserve(self, connection: Connection, offers: Sequence[Offer]) -> Sequence[Slot | str]:
        """For each offer a slot of exactly its length, or why not ("full", "there already", ...)."""

    def done(self, connection: Connection, slot: Slot, outcome: Outcome) -> None:
        """The slot's end. `arrived`: all bytes are there, and match the digest where the transport verifies. Otherwise its
        content is undefined."""


class Connection(Protocol):
    """An authenticated way to one peer; see the module's head for who owns memory."""

    #: what the peer calls itself (it proved that it knows the secret, not that this is its name, unless TLS says so)
    peer: str
    #: address, for log lines
    address: str
    closed: bool

    async def call(self, payload: bytes, deadline: float) -> bytes:
        """A small message and its answer. Never waits behind bulk. Raises TransportError."""

    async def push(self, pieces: Sequence[Piece], deadline: float) -> list[Outcome]:
        """Sends the pieces; one outcome each, in order, as the receiver reported it.

        Raises PeerLost, or DeadlinePassed when the receiver reserves nothing in time; a piece for which only the bytes are late
        has an outcome "late". May be cancelled (task.cancel()): then it ends when no thread reads the arena any more.
        """

    def expect(self, expected: Sequence[Expected], deadline: float) -> list[int]:
        """Lends slots for bytes that we are about to ask for and returns the tickets to put into the request.

        After the deadline a ticket ends by itself ("late"). Raises PeerLost; then nothing was lent.
        """

    def cancel(self, slots: Sequence[Slot], reason: str) -> None:
        """These are not wanted any more. done() follows for each, within a fraction of a second where the bytes move by TCP."""

    def stats(self) -> dict[str, int | float | str]:
        """At least: sent_bytes, received_bytes, drained_bytes (came too late), streams, open_tickets, credit_bytes."""

    async def close(self, reason: str = "closed") -> None:
        """Ends it: pending calls and pushes raise PeerLost, done() follows for every lent slot. Returns when all is released."""


class Transport(Protocol):
    """One daemon's end of one scheme."""

    scheme: str

    async def listen(self, url: str, service: Service) -> str:
        """Listens at the explicit address in `url` (tcp://10.0.0.5:7400; port 0 takes a free one) and returns what others may
        connect to. Raises StartError."""

    async def connect(self, url: str, service: Service, deadline: float) -> Connection:
        """Dials, authenticates both ways. Raises PeerUnreachable, PeerRefused, DeadlinePassed."""

    async def close(self) -> None:
        """Ends the listener and every connection; returns when no thread, socket or slot is left."""


@dataclass(frozen=True)
class Local:
    """What a transport must know of its own daemon."""

    #: how this daemon calls itself to its peers
    name: str
    #: all of the arena, uint8: offsets of pieces and slots count from here
    arena: np.ndarray

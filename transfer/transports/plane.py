"""What a connection stands on: a way of small messages, a way of bytes, and what bounds both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pdserve.transfer.transports.base import Expected

if TYPE_CHECKING:
    from pdserve.transfer.transports.session import Session


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

"""What the two ends of a connection say to each other beside the bytes: small messages, msgpack, every list bounded.

They travel on a way of their own (control), so that no bulk is ever in front of them.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from pdserve.chunk import KEY_BYTES
from pdserve.errors import ProtocolError
from pdserve.transfer.transports.base import MAX_CALL, MAX_META, MAX_PIECES, Outcome, State

#: a full list of offers with long metadata is the largest message
MAX_MESSAGE = 8 << 20

Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Id = Annotated[int, msgspec.Meta(ge=1, le=2**62)]
U64 = Annotated[int, msgspec.Meta(ge=0)]
Ticket = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Length = Annotated[int, msgspec.Meta(ge=1, le=2**40)]
Shard = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]
Sentence = Annotated[str, msgspec.Meta(max_length=1000)]
Payload = Annotated[bytes, msgspec.Meta(max_length=MAX_CALL)]


class _Message(msgspec.Struct, array_like=True, frozen=True):
    pass


class Call(_Message, frozen=True, tag=1):
    id: Id
    payload: Payload
    seconds: Seconds


class Reply(_Message, frozen=True, tag=2):
    id: Id
    payload: Payload


class Failed(_Message, frozen=True, tag=3):
    """The answer to a Call or to Offers that could not be carried out."""

    id: Id
    reason: Sentence


class OfferItem(_Message, frozen=True):
    key: Key
    shard: Shard
    length: Length
    digest: U64
    meta: Annotated[bytes, msgspec.Meta(max_length=MAX_META)]


class Offers(_Message, frozen=True, tag=4):
    id: Id
    items: Annotated[list[OfferItem], msgspec.Meta(max_length=MAX_PIECES)]
    #: how long the slots will be needed at most
    seconds: Seconds


class Grants(_Message, frozen=True, tag=5):
    id: Id
    #: one for each offer, 0 where it was refused
    tickets: Annotated[list[Ticket], msgspec.Meta(max_length=MAX_PIECES)]
    #: for each 0, why
    refusals: Annotated[list[Sentence], msgspec.Meta(max_length=MAX_PIECES)]


class LandedItem(_Message, frozen=True):
    ticket: Ticket
    state: State
    reason: Sentence


class Landed(_Message, frozen=True, tag=6):
    """From the receiver: how slots ended."""

    items: Annotated[list[LandedItem], msgspec.Meta(max_length=MAX_PIECES)]


class Abandon(_Message, frozen=True, tag=7):
    """From the sender: no (more) bytes will come for these."""

    tickets: Annotated[list[Ticket], msgspec.Meta(max_length=MAX_PIECES)]
    late: bool
    reason: Sentence


class Credit(_Message, frozen=True, tag=8):
    """From the receiver: so many more bytes may come."""

    bytes: Annotated[int, msgspec.Meta(ge=1, le=2**40)]


class Alive(_Message, frozen=True, tag=9):
    """Sent when there was nothing else to say for a while."""


class Bye(_Message, frozen=True, tag=10):
    reason: Sentence


class ForPlane(_Message, frozen=True, tag=11):
    """Between what moves the bytes at both ends (addresses, notifications)."""

    payload: Annotated[bytes, msgspec.Meta(max_length=MAX_CALL)]


Message = Call | Reply | Failed | Offers | Grants | Landed | Abandon | Credit | Alive | Bye | ForPlane

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Message:
    """Raises ProtocolError."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ProtocolError(f"malformed message of {len(data)} bytes: {e}") from e


def clipped(reason: str) -> str:
    """As much of it as fits a Sentence."""
    return reason if len(reason) <= 1000 else reason[:997] + "..."


def outcome(item: LandedItem) -> Outcome:
    return Outcome(item.state, item.reason)

"""The protocol between engines and the cache daemon: bytes in, messages out. No sockets here.

A frame is a 4-byte little-endian length and a msgpack message. KV bytes never travel here: they are in the shared arena,
and messages carry keys, offsets, leases. Every list is bounded before anything is built from it. The first message each
way is a greeting that carries the version; another version is refused in words.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from pdserve.chunk import KEY_BYTES
from pdserve.errors import ProtocolError
from pdserve.transfer.telling import Facts

VERSION = 4
MAX_FRAME = 8 << 20
MAX_ITEMS = 65536
MAX_SHARDS = 1024
_LENGTH = 4

Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
OptionalKey = Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES)]
Tag = Annotated[bytes, msgspec.Meta(max_length=16)]
Name = Annotated[str, msgspec.Meta(max_length=200)]
U64 = Annotated[int, msgspec.Meta(ge=0)]
Id = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Message(msgspec.Struct, array_like=True, frozen=True, gc=False):  # hundreds to a call, never in a cycle
    pass


# ---- what a client says ----


class Hello(_Message, frozen=True, tag=1):
    version: int
    name: Name
    pid: int


class Lookup(_Message, frozen=True, tag=2):
    """Longest committed run from the first key on. What is found stays pinned until the lease is released or ends."""

    id: Id
    keys: Annotated[list[Key], msgspec.Meta(max_length=MAX_ITEMS)]
    #: tokens per second that this engine computes, 0: not known; what takes longer to fetch from another host is computed
    prefill_speed: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class ReserveItem(_Message, frozen=True):
    key: Key
    #: key of the chunk before it, empty for the first: a parent outlives its children
    parent: OptionalKey
    shard: Annotated[int, msgspec.Meta(ge=0, lt=MAX_SHARDS)]
    shards: Annotated[int, msgspec.Meta(ge=1, le=MAX_SHARDS)]
    shard_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**40)]
    tokens: Annotated[int, msgspec.Meta(ge=1, le=2**24)]
    #: whose chunk it is, opaque to the daemon: what `DELETE /cache?salt=` and pin quotas go by
    tag: Tag = b""
    #: how many shards, `shard` and those after it, this client writes under one reservation
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_SHARDS)] = 1

    def __post_init__(self) -> None:
        if self.shard + self.count > self.shards:
            raise ValueError(f"shard {self.shard + self.count - 1} of {self.shards}")


class Reserve(_Message, frozen=True, tag=3):
    """Space for chunks. `writer` names the engine: its workers fill the shards of one chunk together."""

    id: Id
    writer: Name
    items: Annotated[list[ReserveItem], msgspec.Meta(max_length=MAX_ITEMS)]


class CommitItem(_Message, frozen=True):
    reservation: Id
    digest: U64
    #: digests of the reservation's further shards
    more: Annotated[list[U64], msgspec.Meta(max_length=MAX_SHARDS)] = []


class Commit(_Message, frozen=True, tag=4):
    """The bytes are written. A chunk becomes visible when all its shards are."""

    id: Id
    items: Annotated[list[CommitItem], msgspec.Meta(max_length=MAX_ITEMS)]


class Abort(_Message, frozen=True, tag=5):
    id: Id
    reservations: Annotated[list[Id], msgspec.Meta(max_length=MAX_ITEMS)]


class Release(_Message, frozen=True, tag=6):
    """Gives a lease back; says what was read, and which chunks did not match their digest."""

    id: Id
    lease: Id
    loaded_chunks: Annotated[int, msgspec.Meta(ge=0, le=MAX_ITEMS)] = 0
    loaded_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**50)] = 0
    corrupt: Annotated[list[Key], msgspec.Meta(max_length=MAX_ITEMS)] = []


class Ping(_Message, frozen=True, tag=7):
    id: Id


class Prefetch(_Message, frozen=True, tag=8):
    """Somebody will ask for these soon: what of them is in lower tiers is brought up, within the same bounds as for a lookup.
    Gives no lease. The answer's count says how many, up to the first key that is nowhere, are on their way."""

    id: Id
    keys: Annotated[list[Key], msgspec.Meta(max_length=MAX_ITEMS)]


class Push(_Message, frozen=True, tag=12):
    """Send these to the daemon of another host, those that are here at once, the others as they are committed."""

    id: Id
    #: its name, or the address of its host
    target: Name
    keys: Annotated[list[Key], msgspec.Meta(max_length=MAX_ITEMS)]


# ---- what the daemon says ----


class Welcome(_Message, frozen=True, tag=20):
    version: int
    #: new at every start: offsets of another daemon mean nothing
    daemon_id: str
    arena_path: str
    arena_bytes: int
    chunk_tokens: int


class Found(_Message, frozen=True):
    offset: int
    tokens: int
    shard_bytes: int
    #: distance from one shard's start to the next one's
    stride: int
    digests: list[int]
    #: where it was until somebody asked for it
    tier: str = "dram"


class LookupReply(_Message, frozen=True, tag=21):
    id: int
    #: 0 when nothing was found
    lease: int
    found: list[Found]
    #: how many of the keys after the found ones are being written now, without a gap
    pending: int
    #: how many of them are on their way up from a lower tier: ask again shortly. Never more than the daemon expects to
    #: have within seconds; a key that turns out to be unreadable is simply not found next time.
    loading: int = 0
    #: goes up when somebody takes chunks away on purpose (clear, drop, corrupt): what a client believes to be stored may not be
    epoch: int = 0


GRANTED, EXISTS, BUSY, FULL, TOO_LARGE = range(5)


class Grant(_Message, frozen=True):
    #: GRANTED; EXISTS (committed already); BUSY (being written by somebody); FULL; TOO_LARGE
    status: int
    reservation: int = 0
    offset: int = 0


class ReserveReply(_Message, frozen=True, tag=22):
    id: int
    grants: list[Grant]


class Ok(_Message, frozen=True, tag=23):
    id: int
    #: how many of the items were carried out
    count: int = 0


class Refused(_Message, frozen=True, tag=24):
    id: int
    reason: str


Request = Hello | Lookup | Reserve | Commit | Abort | Release | Ping | Prefetch | Push | Facts
Reply = Welcome | LookupReply | ReserveReply | Ok | Refused

_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(Request)
_reply_decoder = msgspec.msgpack.Decoder(Reply)


def encode(message: Request | Reply) -> bytes:
    """One frame. Raises ProtocolError when it would be over the bound."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise ProtocolError(f"a {type(message).__name__} of {len(body)} bytes is over the bound of {MAX_FRAME}")
    return len(body).to_bytes(_LENGTH, "little") + body


class FrameReader:
    """Collects bytes and gives back whole frames. Buffers at most one frame of at most MAX_FRAME."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> list[bytes]:
        """The frames that `data` completes, in order. Raises ProtocolError on a length over the bound."""
        self._buffer += data
        frames = []
        start = 0
        while len(self._buffer) - start >= _LENGTH:
            length = int.from_bytes(self._buffer[start : start + _LENGTH], "little")
            if length > MAX_FRAME:
                raise ProtocolError(f"a frame of {length} bytes is over the bound of {MAX_FRAME}")
            if len(self._buffer) - start < _LENGTH + length:
                break
            frames.append(bytes(self._buffer[start + _LENGTH : start + _LENGTH + length]))
            start += _LENGTH + length
        del self._buffer[:start]
        return frames


def decode_request(frame: bytes) -> Request:
    try:
        return _request_decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:  # a text that is not UTF-8 is not msgspec's own error
        raise ProtocolError(f"not a request of version {VERSION}: {e}") from e


def decode_reply(frame: bytes) -> Reply:
    try:
        return _reply_decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise ProtocolError(f"not a reply of version {VERSION}: {e}") from e

"""What daemons say to each other beside the bytes of chunks: one request, one reply, both msgpack. No sockets here.

Like wire.py every list is bounded before anything is built from it. The transport underneath has authenticated the peer
before the first of these is read.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from pdserve.errors import ProtocolError
from pdserve.transfer.wire import MAX_SHARDS, Key, Name, OptionalKey, Tag

VERSION = 2
#: keys in one request to pull
MAX_CHUNKS = 4096
#: 64-bit key prefixes in one answer, as bytes
MAX_KEYS = 65536
_Keys64 = Annotated[bytes, msgspec.Meta(max_length=8 * MAX_KEYS)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Url = Annotated[str, msgspec.Meta(max_length=300)]
#: where a peer has a chunk; each is told of with numbers of its own
MEMORY, DISK = 0, 1
PLACES = ("dram", "disk")
_Place = Annotated[int, msgspec.Meta(ge=MEMORY, le=DISK)]
#: how long somebody may wait for what was asked for
_Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=60.0)]


class _Message(msgspec.Struct, array_like=True, frozen=True):
    pass


# ---- requests ----


class Greet(_Message, frozen=True, tag=1):
    version: int
    name: Name
    #: where it listens
    url: Url
    #: new at every start of that daemon
    epoch: Name


class Sync(_Message, frozen=True, tag=2):
    """What has changed in that place since `seq` of `epoch`; with a cursor, the part of everything that begins there."""

    epoch: Name
    seq: Count
    cursor: Annotated[int, msgspec.Meta(ge=-1)] = -1
    place: _Place = MEMORY


class Pull(_Message, frozen=True, tag=3):
    """Please push these to me; what is on disk only if it is here within so many seconds."""

    url: Url
    keys: Annotated[list[Key], msgspec.Meta(max_length=MAX_CHUNKS)]
    seconds: _Seconds


class Bye(_Message, frozen=True, tag=4):
    """I end, or stop taking part."""

    url: Url


class AskState(_Message, frozen=True, tag=5):
    """What runs on that host, for `pdserve status`."""


class Missing(_Message, frozen=True, tag=6):
    """These were promised in answer to a Pull and do not come after all."""

    url: Url
    keys: Annotated[list[Key], msgspec.Meta(max_length=MAX_CHUNKS)]


# ---- replies ----


class Greeting(_Message, frozen=True, tag=20):
    version: int
    name: Name
    url: Url
    epoch: Name
    chunk_tokens: int
    #: whether there is a disk that chunks may be on
    disk: bool


class Changes(_Message, frozen=True, tag=21):
    """From `after` up to `upto`: keys that are there now, keys that are not; both as 64-bit prefixes."""

    epoch: Name
    after: Count
    upto: Count
    added: _Keys64
    removed: _Keys64
    draining: bool = False
    #: bytes of a chunk, roughly
    chunk_bytes: Count = 0
    #: at which they come up from that place to be sent; 0: at once
    bytes_per_s: Count = 0


class Page(_Message, frozen=True, tag=22):
    """A part of all keys, in order, from `cursor` on; `next` is where the next part begins, -1 after the last."""

    epoch: Name
    seq: Count
    cursor: Annotated[int, msgspec.Meta(ge=0)]
    keys: _Keys64
    next: Annotated[int, msgspec.Meta(ge=-1)]
    draining: bool = False
    chunk_bytes: Count = 0
    bytes_per_s: Count = 0


class Pulling(_Message, frozen=True, tag=23):
    """One flag for each key that was asked for: it will be pushed."""

    coming: Annotated[list[bool], msgspec.Meta(max_length=MAX_CHUNKS)]


class Done(_Message, frozen=True, tag=24):
    pass


class No(_Message, frozen=True, tag=25):
    reason: Annotated[str, msgspec.Meta(max_length=1000)]


class State(_Message, frozen=True, tag=26):
    """state.json of that host's supervisor as it is, empty where there is none."""

    json: Annotated[bytes, msgspec.Meta(max_length=1 << 20)]


Request = Greet | Sync | Pull | Bye | AskState | Missing
Reply = Greeting | Changes | Page | Pulling | Done | No | State


class Meta(_Message, frozen=True):
    """What goes with each offered piece, so that space can be reserved for the whole chunk."""

    format: int
    parent: OptionalKey
    tokens: Annotated[int, msgspec.Meta(ge=1, le=2**24)]
    shard_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**40)]
    shards: Annotated[int, msgspec.Meta(ge=1, le=MAX_SHARDS)]
    tag: Tag = b""


_encoder = msgspec.msgpack.Encoder()
_metas = msgspec.msgpack.Decoder(Meta)
_requests = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)


def encode(message: Request | Reply | Meta) -> bytes:
    return _encoder.encode(message)


def decode_request(data: bytes) -> Request:
    try:
        return _requests.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise ProtocolError(f"not a request of version {VERSION}: {e}") from e


def decode_reply(data: bytes) -> Reply:
    try:
        return _replies.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise ProtocolError(f"not a reply of version {VERSION}: {e}") from e


def decode_meta(data: bytes) -> Meta:
    try:
        return _metas.decode(data)
    except msgspec.MsgspecError as e:
        raise ProtocolError(f"not a chunk's description of version {VERSION}: {e}") from e

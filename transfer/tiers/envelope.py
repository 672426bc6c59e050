"""How a chunk is written down where bytes are all there is: a header with the record, then the shards one after another.

    "PDKV" | version u16 | 0 u16 | length of the record u32 | record (msgpack) | blake3 of all that, 8 bytes | zeros

The zeros fill up to a multiple of `pad`. A header is a pure function of its record, so whoever holds a record knows the
header that must stand in front of its payload, and a payload that was replaced meanwhile is noticed.
"""

from __future__ import annotations

import struct

import msgspec
from blake3 import blake3

from pdserve.transfer.tiers.base import ChunkRecord
from pdserve.transfer.wire import MAX_SHARDS

VERSION = 1
#: what a reader fetches first; the header of a chunk with up to about 400 shards fits
PAGE = 4096
MAX_SHARD_BYTES = 2**40
MAX_TOKENS = 2**24

_FIXED = struct.Struct("<4sHHI")
_MAGIC = b"PDKV"
_CHECK_BYTES = 8
_MAX_RECORD = 64 << 10
_decoder = msgspec.msgpack.Decoder(ChunkRecord)


def header(record: ChunkRecord, pad: int = PAGE) -> bytes:
    """What stands in front of the payload; `pad` 1 for no padding."""
    body = msgspec.msgpack.encode(record)
    head = _FIXED.pack(_MAGIC, VERSION, 0, len(body)) + body
    head += blake3(head).digest(length=_CHECK_BYTES)
    return head + bytes(-len(head) % pad)


def header_bytes(start: bytes, pad: int = PAGE) -> int:
    """Length of the header that begins with `start`; 0 when it is not one of ours."""
    if len(start) < _FIXED.size:
        return 0
    magic, version, _, length = _FIXED.unpack_from(start)
    if magic != _MAGIC or version != VERSION or length > _MAX_RECORD:
        return 0
    total = _FIXED.size + int(length) + _CHECK_BYTES
    return total + -total % pad


def read_header(data: bytes, key: bytes, pad: int = PAGE) -> ChunkRecord | None:
    """The record in front of a payload; None when it is damaged, of another version or of another chunk."""
    total = header_bytes(data, pad)
    if not total or len(data) < total:
        return None
    (length,) = struct.unpack_from("<I", data, _FIXED.size - 4)
    end = _FIXED.size + length
    if blake3(data[:end]).digest(length=_CHECK_BYTES) != data[end : end + _CHECK_BYTES]:
        return None
    try:
        record = _decoder.decode(data[_FIXED.size : end])
    except msgspec.MsgspecError:
        return None
    return record if record.key == key and _sane(record) else None


def _sane(record: ChunkRecord) -> bool:
    """Bounds of what a record may ask a reader to allocate."""
    return (
        1 <= len(record.digests) <= MAX_SHARDS
        and 1 <= record.shard_bytes <= MAX_SHARD_BYTES
        and 1 <= record.tokens <= MAX_TOKENS
        and all(0 <= d < 2**64 for d in record.digests)
    )

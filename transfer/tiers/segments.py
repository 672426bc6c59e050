"""Segment files of the disk tier: what is written where, and reading it back without believing it.

A file is a sequence of pages (4 KiB). First a page that names the segment, then records, one after another:

    header: magic (8) | length of body (4) | blake3 of magic, length and body (16) | body (msgpack) | zeros to a whole page
    payload: the chunk's shards, each padded with zeros to a whole page

so that every shard can be read straight into the page-aligned arena with O_DIRECT. The body says in which segment and
where it stands: a header that turns up elsewhere is not taken. A record that is deleted gets another magic in its place
and keeps its length. Nothing here has state; disk.py keeps the index.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import msgspec
import numpy as np
from blake3 import blake3

from pdserve.chunk import KEY_BYTES
from pdserve.transfer.allocator import PAGE, align
from pdserve.transfer.tiers.base import ChunkRecord, TierError
from pdserve.transfer.wire import MAX_SHARDS

#: of the files; a segment of another version is not read (and goes when the space is needed)
DISK_FORMAT = 1
MAX_HEADER = 16 * PAGE
_SEGMENT, _LIVE, _DEAD = b"pdserveS", b"pdserveL", b"pdserveD"
_FIXED = 8 + 4 + 16
#: pages looked through at a time when a header is damaged and the next one is searched
_SEARCH = 256
_IOV_MAX = 512
_MAX_CALL = 64 << 20

Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class SegmentName(msgspec.Struct, frozen=True, array_like=True):
    """The first page. `created` tells a segment from an earlier one of the same number."""

    format: int
    number: int
    created: float


class _Body(msgspec.Struct, frozen=True, array_like=True):
    """What a header says. The record's fields are spelt out, so that each has its bound."""

    segment: Annotated[int, msgspec.Meta(ge=0)]
    offset: Annotated[int, msgspec.Meta(ge=PAGE, multiple_of=PAGE)]
    format: Annotated[int, msgspec.Meta(ge=0)]
    key: Key
    parent: Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES)]
    tokens: Annotated[int, msgspec.Meta(ge=1, le=2**24)]
    shard_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**40)]
    digests: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1, max_length=MAX_SHARDS)]
    tag: Annotated[bytes, msgspec.Meta(max_length=16)]


_bodies = msgspec.msgpack.Decoder(_Body)
_names = msgspec.msgpack.Decoder(SegmentName)


class Place(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a record stands in its segment."""

    offset: int
    header_bytes: int
    record: ChunkRecord

    @property
    def total(self) -> int:
        return self.header_bytes + payload_on_disk(self.record)

    @property
    def end(self) -> int:
        return self.offset + self.total


def payload_on_disk(record: ChunkRecord) -> int:
    return align(record.shard_bytes) * len(record.digests)


# ---- headers ----


def _page(magic: bytes, body: bytes) -> bytes:
    head = magic + len(body).to_bytes(4, "little")
    whole = head + blake3(head + body).digest(length=16) + body
    return whole + bytes(-len(whole) % PAGE)


def _open_page(data: bytes | memoryview) -> tuple[bytes, bytes] | None:
    """(magic, body), or None when it is not a page of ours, whole and undamaged."""
    head = bytes(data[:12])
    length = int.from_bytes(head[8:12], "little")
    if len(head) < 12 or _FIXED + length > min(len(data), MAX_HEADER):
        return None
    body = bytes(data[_FIXED : _FIXED + length])
    if blake3(head + body).digest(length=16) != bytes(data[12:_FIXED]):
        return None
    return head[:8], body


def first_page(name: SegmentName) -> bytes:
    return _page(_SEGMENT, msgspec.msgpack.encode(name))


def read_first_page(data: bytes | memoryview) -> SegmentName | None:
    """Who the segment says it is; None when it is not one that this version reads."""
    opened = _open_page(data)
    if opened is None or opened[0] != _SEGMENT:
        return None
    try:
        name = _names.decode(opened[1])
    except msgspec.MsgspecError:
        return None
    return name if name.format == DISK_FORMAT else None


def header(segment: int, offset: int, record: ChunkRecord, *, live: bool = True) -> bytes:
    r = record
    body = _Body(segment, offset, r.format, r.key, r.parent, r.tokens, r.shard_bytes, r.digests, r.tag)
    return _page(_LIVE if live else _DEAD, msgspec.msgpack.encode(body))


def header_room(record: ChunkRecord) -> int:
    """Bytes that the record's header takes at most, wherever it stands."""
    return align(_FIXED + 160 + len(record.key) + len(record.parent) + len(record.tag) + 9 * len(record.digests))


def read_header(data: bytes | memoryview, segment: int, offset: int) -> tuple[Place, bool] | None:
    """(the record that stands there, whether it is live), or None when no header of this segment and offset does."""
    opened = _open_page(data)
    if opened is None or opened[0] not in (_LIVE, _DEAD):
        return None
    try:
        b = _bodies.decode(opened[1])
    except msgspec.MsgspecError:
        return None
    if b.segment != segment or b.offset != offset or any(d >= 2**64 for d in b.digests):
        return None
    record = ChunkRecord(b.format, b.key, b.parent, b.tokens, b.shard_bytes, b.digests, b.tag)
    return Place(offset, align(_FIXED + len(opened[1])), record), opened[0] == _LIVE


# ---- scanning ----


class Scanned(msgspec.Struct, frozen=True):
    place: Place
    live: bool


def scan(fd: int, segment: int, start: int, size: int) -> Iterator[Scanned | int]:
    """The records from `start` on, by their headers alone; at last an int: where the next record goes.

    A damaged header costs its record: the next sound one is searched. What follows the last sound record (a torn tail) is
    behind the int; so is a last record whose payload is not all there.
    """
    offset = end = start
    buffer = aligned(MAX_HEADER)
    while offset + PAGE <= size:
        found = read_header(_read_page(fd, offset, size, buffer), segment, offset)
        if found is None:
            offset = _search(fd, segment, offset + PAGE, size)
            continue
        place, live = found
        if place.end > size:
            break
        yield Scanned(place, live)
        offset = end = place.end
    yield end


def _search(fd: int, segment: int, offset: int, size: int) -> int:
    """Where the next sound header is; `size` when there is none."""
    buffer = aligned(_SEARCH * PAGE)
    while offset + PAGE <= size:
        data = _read_some(fd, offset, min(_SEARCH * PAGE, size - offset), buffer)
        if len(data) < PAGE:
            break
        for at in range(0, len(data) // PAGE * PAGE, PAGE):
            if data[at : at + 8] in (_LIVE, _DEAD):
                # A header of several pages may reach beyond what was read.
                again = _read_some(fd, offset + at, min(MAX_HEADER, size - offset - at), aligned(MAX_HEADER))
                if read_header(again, segment, offset + at) is not None:
                    return offset + at
        offset += len(data) // PAGE * PAGE
    return size


def _read_page(fd: int, offset: int, size: int, buffer: np.ndarray) -> memoryview:
    """What may be a header: its first page, and the rest where that page says that there is more."""
    data = _read_some(fd, offset, min(PAGE, size - offset), buffer)
    length = _FIXED + int.from_bytes(data[8:12], "little")
    if length <= PAGE or data[:8] not in (_LIVE, _DEAD):
        return data
    return _read_some(fd, offset, min(MAX_HEADER, size - offset), buffer)


def _read_some(fd: int, offset: int, length: int, buffer: np.ndarray) -> memoryview:
    view = buffer.data[: align(length)]
    return view[: min(length, os.preadv(fd, [view], offset))]


# ---- bytes ----


def aligned(size: int) -> np.ndarray:
    """Zeroed memory that begins on a page, as O_DIRECT wants it."""
    return np.frombuffer(mmap.mmap(-1, max(PAGE, align(size))), np.uint8)


_of_thread = threading.local()


def _scratch(size: int) -> np.ndarray:
    """Aligned memory of this thread for a header: mapping some anew each time costs as much as the rest of a call."""
    if size > MAX_HEADER:
        return aligned(size)
    if not hasattr(_of_thread, "page"):
        _of_thread.page = aligned(MAX_HEADER)
    page: np.ndarray = _of_thread.page
    return page[:size]


def open_file(path: str, flags: int, mode: int = 0o600) -> tuple[int, bool]:
    """(file descriptor, whether it bypasses the page cache). Some file systems refuse that."""
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT, mode), True
    except OSError as e:
        if e.errno not in (22, 95):  # EINVAL, EOPNOTSUPP
            raise
        return os.open(path, flags | os.O_CLOEXEC, mode), False


Written = tuple[bytes, list[np.ndarray]]  # a header, and the shards behind it


def write_records(fd: int, offset: int, records: Sequence[Written], deadline: float) -> None:
    """One after another, in one call as far as the system allows."""
    heads = _scratch(sum(len(head) for head, _ in records))
    views, at = [], 0
    for head, shards in records:
        heads[at : at + len(head)] = np.frombuffer(head, np.uint8)
        views.append(heads[at : at + len(head)].data)
        at += len(head)
        for shard in shards:
            views += _as_pages(shard)
    _all(os.pwritev, fd, views, offset, deadline)


def write_record(fd: int, offset: int, head: bytes, shards: list[np.ndarray], deadline: float) -> None:
    write_records(fd, offset, [(head, shards)], deadline)


def read_record(fd: int, place: Place, shards: list[np.ndarray], deadline: float) -> memoryview:
    """Reads header and payload in one go, the payload into `shards`; returns the header's bytes, to be compared before
    this thread reads or writes again."""
    first = _scratch(place.header_bytes)
    views = [first.data]
    patches: list[tuple[np.ndarray, np.ndarray]] = []
    for shard in shards:
        views += _into_pages(shard, patches)
    _all(os.preadv, fd, views, place.offset, deadline)
    for to, source in patches:
        to[:] = source
    return first.data


def _as_pages(shard: np.ndarray) -> list[memoryview]:
    """The shard as whole pages of aligned memory: in place where it is, its last part page (or an unaligned one) copied."""
    whole = shard.size // PAGE * PAGE if shard.ctypes.data % PAGE == 0 else 0
    views = [shard[:whole].data] if whole else []
    if whole < shard.size:
        rest = aligned(shard.size - whole)
        rest[: shard.size - whole] = shard[whole:]
        views.append(rest.data)
    return views


def _into_pages(shard: np.ndarray, patches: list[tuple[np.ndarray, np.ndarray]]) -> list[memoryview]:
    whole = shard.size // PAGE * PAGE if shard.ctypes.data % PAGE == 0 else 0
    views = [shard[:whole].data] if whole else []
    if whole < shard.size:
        rest = aligned(shard.size - whole)
        patches.append((shard[whole:], rest[: shard.size - whole]))
        views.append(rest.data)
    return views


def _all(
    call: Callable[[int, list[memoryview], int], int], fd: int, views: list[memoryview], offset: int, deadline: float
) -> None:
    """pwritev or preadv until every view is done. Raises OSError, or TierError at the end of the file or of the time.

    The one place where a disk is asked for bytes: an io_uring that takes aligned buffers would come in here.
    """
    rest = [v for v in views if len(v)]
    while rest:
        if time.monotonic() > deadline:
            raise TierError("disk: deadline passed")
        offset, rest = _after(rest, call(fd, _batch(rest), offset), offset)


def _batch(views: list[memoryview]) -> list[memoryview]:
    """As much of them as one call should take."""
    if len(views) <= _IOV_MAX and sum(map(len, views)) <= _MAX_CALL:
        return views
    batch, size = [], 0
    for view in views[:_IOV_MAX]:
        view = view[: _MAX_CALL - size]
        batch.append(view)
        size += len(view)
        if size >= _MAX_CALL:
            break
    return batch


def _after(rest: list[memoryview], done: int, offset: int) -> tuple[int, list[memoryview]]:
    """Where to go on after `done` bytes, and with what."""
    if done <= 0:
        raise TierError("disk: the file ends before the record does")
    offset += done
    while rest and done >= len(rest[0]):
        done -= len(rest[0])
        rest = rest[1:]
    if done:
        if done % PAGE:
            raise TierError("disk: a read or write stopped inside a page")
        rest = [rest[0][done:], *rest[1:]]
    return offset, rest

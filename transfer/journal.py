"""What is in the arena, written down beside it, so that a daemon that was killed finds its chunks again.

A file in /dev/shm like the arena itself (both are gone together when the machine restarts): a head, then one entry for
each chunk that became visible and each that went. Entries carry a checksum; the first that is not whole ends the reading.
The journal need not be believed: nothing that it says may be found before the digests of the bytes are verified. So it
costs one small copy for a batch of commits and never a sync.

When most of the file is of the past, it is written anew beside the old one, some entries with each flush: all of them at
once would hold up requests, for 10 ms and more with 100,000 chunks. Until it is complete both are kept up.
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import msgspec

from pdserve import log
from pdserve.chunk import KEY_BYTES
from pdserve.errors import StartError
from pdserve.transfer import faults
from pdserve.transfer.append_file import AppendFile
from pdserve.transfer.resident import Chunk
from pdserve.transfer.tiers.base import ChunkRecord
from pdserve.transfer.wire import MAX_SHARDS

FORMAT = 1
#: the file is written anew when it is this much longer than what it has to say
SLACK, MIN_COMPACT = 4, 1 << 20
#: of what is written anew, at least so many entries go along with each flush, and so many for each new one
A_FLUSH, FOR_EACH = 64, 4
_MAX_ENTRY = 1 << 20

Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class _Head(msgspec.Struct, array_like=True, frozen=True, tag=1):
    format: int
    arena_bytes: int
    created: float


class _Came(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """A chunk is visible at `offset`."""

    key: Key
    parent: Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES)]
    offset: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    format: int
    tokens: Annotated[int, msgspec.Meta(ge=1, le=2**24)]
    shard_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**40)]
    digests: Annotated[list[int], msgspec.Meta(min_length=1, max_length=MAX_SHARDS)]
    tag: Annotated[bytes, msgspec.Meta(max_length=16)]


class _Went(msgspec.Struct, array_like=True, frozen=True, tag=3):
    key: Key


_decoder = msgspec.msgpack.Decoder(_Head | _Came | _Went)

Left = list[tuple[ChunkRecord, int]]


def path_for(arena: Path) -> Path:
    return arena.with_suffix(".journal")


class Journal:
    """One writer. committed() and forgotten() only note; flush() writes, before anybody acts upon what was noted."""

    def __init__(self, path: Path, fault: faults.Fault = faults.none) -> None:
        self.path = path
        self._fault = fault
        self._log = log.get("journal")
        self._notes: list[bytes] = []
        self._live: dict[bytes, bytes] = {}  # key -> its entry
        self._live_bytes = 0
        self._head = b""
        self._broken = False
        #: what takes the file's place when it is complete, and the keys that it does not have yet
        self._fresh: tuple[AppendFile, Iterator[bytes]] | None = None
        try:
            self._file = AppendFile(path)
            if os.stat(path).st_ino != os.fstat(self._file.fd).st_ino:
                self._file.close()
                raise BlockingIOError  # another daemon has just written it anew
        except OSError as e:
            raise StartError(f"another cache daemon of this name is running ({path} is locked)") from e

    def read(self, arena_bytes: int) -> Left:
        """What an earlier daemon had in an arena of this size; what it wrote after its last whole entry is cut off."""
        entries = _entries(self._file.read())
        head = entries[0] if entries else None
        if not isinstance(head, _Head) or head.format != FORMAT or head.arena_bytes != arena_bytes:
            return []
        left: dict[bytes, tuple[ChunkRecord, int]] = {}
        for entry in entries[1:]:
            if isinstance(entry, _Came):
                left.pop(entry.key, None)
                left[entry.key] = (_record(entry), entry.offset)
            elif isinstance(entry, _Went):
                left.pop(entry.key, None)
        return list(left.values())

    def begin(self, arena_bytes: int, left: Left) -> None:
        """Starts to write: a new file that says what is left."""
        self._head = _frame(_Head(FORMAT, arena_bytes, time.time()))
        for record, offset in left:
            self._note(record, offset)
        self._notes.clear()
        try:
            self._write_anew()
            self._go_on(len(self._live) + 1)
        except OSError as e:
            self._give_up(e)

    def committed(self, chunk: Chunk) -> None:
        entry = self._note(chunk.record(), chunk.offset)
        self._notes.append(entry)

    def forgotten(self, chunk: Chunk) -> None:
        entry = self._live.pop(chunk.key, None)
        if entry is not None:
            self._live_bytes -= len(entry)
            self._notes.append(_frame(_Went(chunk.key)))

    def flush(self) -> None:
        if not self._notes or self._broken:
            return
        data, count = b"".join(self._notes), len(self._notes)
        self._notes.clear()
        self._fault("journal.append")
        try:
            self._file.append(data)
            if self._fresh is not None:
                self._fresh[0].append(data)
                self._go_on(A_FLUSH + FOR_EACH * count)
            elif self._file.length > MIN_COMPACT + SLACK * self._live_bytes:
                self._write_anew()
        except OSError as e:
            self._give_up(e)

    def close(self, *, keep: bool) -> None:
        self._drop_fresh()
        if not keep:
            self.path.unlink(missing_ok=True)
        self._file.close()

    # ---- inside ----

    def _note(self, record: ChunkRecord, offset: int) -> bytes:
        r = record
        entry = _frame(_Came(r.key, r.parent, offset, r.format, r.tokens, r.shard_bytes, r.digests, r.tag))
        self._live_bytes += len(entry) - len(self._live.pop(r.key, b""))
        self._live[r.key] = entry
        return entry

    @property
    def _fresh_path(self) -> Path:
        return self.path.with_suffix(".journal.new")

    def _write_anew(self) -> None:
        """Begins to."""
        file = AppendFile(self._fresh_path, fresh=True)
        self._fresh = file, iter(list(self._live))
        self._fault("journal.compact.write")
        file.append(self._head)

    def _go_on(self, count: int) -> None:
        """Adds up to `count` of what is live now; fewer are the last. What came or went since the beginning stands there, too:
        an entry that is written twice is the same one."""
        assert self._fresh is not None
        file, left = self._fresh
        keys = list(islice(left, count))
        file.append(b"".join([self._live.get(key, b"") for key in keys]))
        if len(keys) == count:
            return
        self._fault("journal.compact.rename")
        self._fresh_path.replace(self.path)
        self._file.close()
        self._file, self._fresh = file, None

    def _drop_fresh(self) -> None:
        if self._fresh is not None:
            self._fresh[0].close()
            self._fresh = None
            self._fresh_path.unlink(missing_ok=True)

    def _give_up(self, error: OSError) -> None:
        """Better no journal than one that lacks something: without it the next daemon starts with an empty arena."""
        self._broken = True
        self._log.warning("the journal cannot be written (%s): chunks in memory will not survive a crash", error)
        with contextlib.suppress(OSError):
            self._drop_fresh()
        with contextlib.suppress(OSError):
            self._file.empty()


def _record(entry: _Came) -> ChunkRecord:
    e = entry
    return ChunkRecord(e.format, e.key, e.parent, e.tokens, e.shard_bytes, e.digests, e.tag)


def _frame(entry: _Head | _Came | _Went) -> bytes:
    body = msgspec.msgpack.encode(entry)
    return len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body


def _entries(data: bytes) -> list[_Head | _Came | _Went]:
    """Up to the first that is not whole."""
    entries: list[_Head | _Came | _Went] = []
    at = 0
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        body = data[at + 8 : at + 8 + length]
        if (
            length > _MAX_ENTRY
            or len(body) < length
            or zlib.crc32(body) != int.from_bytes(data[at + 4 : at + 8], "little")
        ):
            break
        try:
            entries.append(_decoder.decode(body))
        except msgspec.MsgspecError:
            break
        at += 8 + length
    return entries

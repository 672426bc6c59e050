"""What is in the arena, written down beside it, so that a daemon that was killed finds its chunks again.

A file in /dev/shm like the arena itself (both are gone together when the machine restarts): a head, then one entry for
each chunk that became visible and each that went. Entries carry a checksum; the first that is not whole ends the reading.
The journal need not be believed: nothing that it says may be found before the digests of the bytes are verified. So it
costs one small write for a batch of commits and never a sync.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import zlib
from pathlib import Path
from typing import Annotated

import msgspec

from pdserve import log
from pdserve.chunk import KEY_BYTES
from pdserve.errors import StartError
from pdserve.transfer import faults
from pdserve.transfer.resident import Chunk
from pdserve.transfer.tiers.base import ChunkRecord
from pdserve.transfer.wire import MAX_SHARDS

FORMAT = 1
#: the file is written anew when it is this much longer than what it has to say
SLACK, MIN_COMPACT = 4, 1 << 20
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
        self._live_bytes = self._file_bytes = 0
        self._head = b""
        self._broken = False
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lock()

    def read(self, arena_bytes: int) -> Left:
        """What an earlier daemon had in an arena of this size; what it wrote after its last whole entry is cut off."""
        data = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        entries = _entries(data)
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
            self._rewrite()
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
        data = b"".join(self._notes)
        self._notes.clear()
        self._fault("journal.append")
        try:
            _write(self._fd, data)
            self._file_bytes += len(data)
            if self._file_bytes > MIN_COMPACT + SLACK * self._live_bytes:
                self._rewrite()
        except OSError as e:
            self._give_up(e)

    def close(self, *, keep: bool) -> None:
        if not keep:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)

    # ---- inside ----

    def _note(self, record: ChunkRecord, offset: int) -> bytes:
        r = record
        entry = _frame(_Came(r.key, r.parent, offset, r.format, r.tokens, r.shard_bytes, r.digests, r.tag))
        self._live_bytes += len(entry) - len(self._live.pop(r.key, b""))
        self._live[r.key] = entry
        return entry

    def _rewrite(self) -> None:
        fresh = self.path.with_suffix(".journal.new")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            data = b"".join([self._head, *self._live.values()])
            self._fault("journal.compact.write")
            _write(fd, data)
            self._fault("journal.compact.rename")
            fresh.replace(self.path)
        except OSError:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd, self._file_bytes = fd, len(data)

    def _give_up(self, error: OSError) -> None:
        """Better no journal than one that lacks something: without it the next daemon starts with an empty arena."""
        self._broken = True
        self._log.warning("the journal cannot be written (%s): chunks in memory will not survive a crash", error)
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(self.path).st_ino != os.fstat(self._fd).st_ino:
                raise BlockingIOError  # another daemon has just written it anew
        except OSError as e:
            os.close(self._fd)
            raise StartError(f"another cache daemon of this name is running ({self.path} is locked)") from e


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


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]

"""Chunks as files in a directory that several hosts share (NFS and the like), or in any plain directory.

One file a chunk, under 256 folders: a header page, then the shards. A file is written under another name, synced and then
renamed, so that what has its name is whole. Nothing is locked: two writers of one chunk both write, and the last rename
stays. A network file system may hang for minutes, so all system calls happen on the tier's own threads (offload.py).

A directory has no cap of its own. Put refuses while less than `min_free` of the file system is free, and files that nobody
has stored or read for `ttl` seconds are removed, a folder at a time, while others are stored.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from pdserve.transfer.tiers import envelope
from pdserve.transfer.tiers.base import ChunkRecord, CorruptChunk, TierError
from pdserve.transfer.tiers.offload import Offload, Operation

FOLDERS = 256
_SUFFIX = ".chunk"
_PIECE = 4 << 20
_BATCH = 64
#: a temporary file this old belongs to a writer that is dead
_ABANDONED_S = 3600.0
#: one folder is swept for every so many puts, so that the whole directory is after FOLDERS times that
_PUTS_PER_SWEEP = 16
#: a read counts as a use; noting it once in this part of the ttl is enough
_TOUCH_PART = 10
_FULL = (errno.ENOSPC, errno.EDQUOT)


class FsOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be set; registry.py fills it from a URL's query."""

    root: str
    #: seconds after which a chunk that nobody stored or read goes
    ttl: float = 7 * 86400.0
    #: the part of the file system that is left free
    min_free: float = 0.05
    #: seconds that contains() and delete() may take
    timeout: float = 1.0
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4


class FsTier:
    """See the module's head."""

    def __init__(self, options: FsOptions) -> None:
        self.name = "fs"
        self._root, self._ttl = Path(options.root), options.ttl
        self._min_free, self._timeout = options.min_free, options.timeout
        self._state = "ok"
        self._puts = count(1)
        self._buffers = threading.local()
        self._io = Offload(self.name, options.threads)

    def contains(self, keys: list[bytes]) -> list[ChunkRecord | None]:
        def look(batch: list[bytes]) -> list[ChunkRecord | None]:
            with _mapped():
                return [self._read_record(key) for key in batch]

        jobs = [partial(lambda batch, _: look(batch), keys[i : i + _BATCH]) for i in range(0, len(keys), _BATCH)]
        return [record for found in self._io.run(jobs, self._soon()) for record in found]

    def get(self, record: ChunkRecord, into: list[np.ndarray], deadline: float) -> bool:
        def job(operation: Operation) -> bool:
            with _mapped():
                return self._read(record, into, operation)

        return self._io.call(job, deadline)

    def put(self, record: ChunkRecord, payload: list[np.ndarray], deadline: float) -> bool:
        def job(operation: Operation) -> bool:
            with _mapped():
                return self._write(record, payload, operation)

        stored = self._io.call(job, deadline)
        if next(self._puts) % _PUTS_PER_SWEEP == 0:
            self._io.start(self._sweep)
        return stored

    def delete(self, keys: list[bytes]) -> int:
        def job(_: Operation) -> int:
            with _mapped():
                return sum(_unlink(self.path(key)) for key in keys)

        return self._io.call(job, self._soon())

    def listing(self, deadline: float) -> Iterator[ChunkRecord]:
        def job(folder: Path, _: Operation) -> list[ChunkRecord]:
            with _mapped():
                names = [f.name for f in folder.iterdir() if f.name.endswith(_SUFFIX)] if folder.is_dir() else []
                keys = [
                    bytes.fromhex(stem) for n in names if re.fullmatch("[0-9a-f]{64}", stem := n.removesuffix(_SUFFIX))
                ]
                return [record for key in keys if (record := self._read_record(key)) is not None]

        for number in range(FOLDERS):
            yield from self._io.call(partial(job, self._root / f"{number:02x}"), deadline)

    def stats(self) -> dict[str, int | float | str]:
        # How many files there are is not known without walking a directory that others write to as well.
        return {"chunks": 0, "used_bytes": 0, "capacity_bytes": 0, "state": self._state, "directory": str(self._root)}

    def close(self) -> None:
        self._io.close(2.0)

    def path(self, key: bytes) -> Path:
        """Where the chunk's file is."""
        name = key.hex()
        return self._root / name[:2] / (name + _SUFFIX)

    # ---- on the tier's threads ----

    def _read_record(self, key: bytes) -> ChunkRecord | None:
        try:
            fd = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            start = os.pread(fd, envelope.PAGE, 0)
            needed = envelope.header_bytes(start)
            if needed > len(start):
                start += os.pread(fd, needed - len(start), len(start))
            record = envelope.read_header(start, key)
            whole = record is not None and os.fstat(fd).st_size == needed + record.payload_bytes
            return record if whole else None
        finally:
            os.close(fd)

    def _read(self, record: ChunkRecord, into: list[np.ndarray], operation: Operation) -> bool:
        path = self.path(record.key)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            head = envelope.header(record)
            facts = os.fstat(fd)
            if os.pread(fd, len(head), 0) != head:
                return False  # replaced by another writer's, or its header is damaged: contains() says so too
            if facts.st_size != len(head) + record.payload_bytes:
                _unlink(path)
                raise CorruptChunk(f"fs: {path} has {facts.st_size} bytes; removed")
            self._read_payload(fd, len(head), into, operation)
            if time.time() - facts.st_mtime > self._ttl / _TOUCH_PART:
                with contextlib.suppress(OSError):  # a directory that is mounted read-only still serves
                    os.utime(fd)
        finally:
            os.close(fd)
        return True

    def _read_payload(self, fd: int, at: int, into: list[np.ndarray], operation: Operation) -> None:
        """By way of a buffer of the thread's own: a read that hangs must not be aimed at the arena."""
        piece = self._piece()
        for shard in into:
            for start in range(0, shard.nbytes, _PIECE):
                end = min(start + _PIECE, shard.nbytes)
                done = 0
                while done < end - start:
                    got = os.preadv(fd, [piece[done : end - start]], at + done)
                    if not got:
                        raise TierError("fs: the file became shorter while it was read")
                    done += got
                operation.copy(shard[start:end], piece[: end - start])
                at += end - start

    def _write(self, record: ChunkRecord, payload: list[np.ndarray], operation: Operation) -> bool:
        path = self.path(record.key)
        if self._read_record(record.key) == record:
            os.utime(path)
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        space = os.statvfs(path.parent)
        left = space.f_bavail * space.f_frsize - _file_bytes(record)
        if left < self._min_free * space.f_blocks * space.f_frsize:
            self._state = f"full: less than {self._min_free:.0%} of the file system would stay free"
            return False
        temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}"
        try:
            self._write_file(temporary, record, payload, operation)
            if operation.over:
                raise TierError("fs: too late")
            temporary.replace(path)
        except OSError as e:
            _unlink(temporary)
            if e.errno in _FULL:
                self._state = f"full: {e.strerror}"
                return False
            raise
        except TierError:
            _unlink(temporary)
            raise
        _sync_folder(path.parent)
        self._state = "ok"
        return True

    def _write_file(self, path: Path, record: ChunkRecord, payload: list[np.ndarray], operation: Operation) -> None:
        piece = self._piece()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, memoryview(envelope.header(record)))
            for shard in payload:
                for start in range(0, shard.nbytes, _PIECE):
                    part = shard[start : start + _PIECE]
                    operation.copy(piece[: part.nbytes], part)
                    _write_all(fd, memoryview(piece[: part.nbytes]))
            os.fsync(fd)
        finally:
            os.close(fd)

    def _piece(self) -> np.ndarray:
        if not hasattr(self._buffers, "piece"):
            self._buffers.piece = np.empty(_PIECE, np.uint8)
        piece: np.ndarray = self._buffers.piece
        return piece

    def _sweep(self, _: Operation) -> None:
        """Removes from one folder, chosen at random, what has not been used for long and what dead writers left."""
        now = time.time()
        with contextlib.suppress(OSError), os.scandir(self._root / f"{secrets.randbelow(FOLDERS):02x}") as folder:
            for entry in folder:
                age = now - entry.stat().st_mtime
                if age > (self._ttl if entry.name.endswith(_SUFFIX) else _ABANDONED_S):
                    _unlink(Path(entry.path))

    def _soon(self) -> float:
        return time.monotonic() + self._timeout


def _file_bytes(record: ChunkRecord) -> int:
    return len(envelope.header(record)) + record.payload_bytes


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise TierError(f"fs: {e}") from e

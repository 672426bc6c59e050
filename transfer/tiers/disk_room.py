"""How much the disk tier may write: its cap, and the free space that it leaves to others."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from pdserve.transfer.allocator import PAGE
from pdserve.transfer.tiers import segments
from pdserve.transfer.tiers.base import ChunkRecord, ToStore

MIN_SIZE = 64 << 20

#: part of a segment's bytes that compaction may carry over when the segment goes; the cap keeps room for it
KEEP_SHARE = 4
#: how long, and for how many bytes at most, the answer about free space is taken as good
LOOK_S, LOOK_BYTES = 1.0, 256 << 20


def real_room(path: Path, size: int, min_free: int, taken: int) -> int:
    """What a tier that has `taken` bytes already can come to take: its cap, or what the file system has, if that is less."""
    facts = os.statvfs(path)
    return min(size, max(MIN_SIZE // 2, facts.f_bavail * facts.f_frsize + taken - min_free))


def room_of(record: ChunkRecord) -> int:
    """Bytes that the chunk takes at most."""
    return segments.header_room(record) + segments.payload_on_disk(record)


def grouped(chunks: list[ToStore], most: int) -> Iterator[list[ToStore]]:
    """In order, each group of at most `most` bytes or of a single chunk."""
    group: list[ToStore] = []
    size = 0
    for chunk in chunks:
        room = room_of(chunk[0])
        if group and size + room > most:
            yield group
            group, size = [], 0
        group.append(chunk)
        size += room
    if group:
        yield group


class Room:
    """One writer asks at a time."""

    def __init__(self, path: Path, size: int, min_free: int, segment_bytes: int) -> None:
        self._path, self._size, self._min_free = path, size, min_free
        self._kept = min(segment_bytes, size // 8) // KEEP_SHARE
        self._left, self._look_at = 0, 0.0

    def limit(self, chunks: int) -> int:
        """Bytes that segments may take while `chunks` are in the index: the index file, and the one that takes its place,
        count against the cap, too."""
        return self._size - self._kept - (4096 + 2 * 256 * chunks) - PAGE

    def is_free(self, total: int) -> bool:
        """Whether the floor holds after so many bytes more. Others write, too: half of what is left may go unseen."""
        now = time.monotonic()
        if total > self._left or now >= self._look_at:
            left = self.free() - self._min_free
            if left < total:
                self._left = 0
                return False
            self._left, self._look_at = max(total, min(left // 2, LOOK_BYTES)), now + LOOK_S
        self._left -= total
        return True

    def free(self) -> int:
        facts = os.statvfs(self._path)
        return facts.f_bavail * facts.f_frsize

"""What the disk tier has, and where: its open segments and the chunks in them. The next start must find the same; so what goes from
here also goes from the disk, or is marked there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from pdserve.transfer import faults
from pdserve.transfer.tiers import disk_index, segments
from pdserve.transfer.tiers.base import ChunkRecord
from pdserve.transfer.tiers.disk_index import Entry, Index, Segment
from pdserve.transfer.tiers.segments import Place


class Shelf:
    """Any thread may ask. `lock` guards everything, and is never held across I/O: the daemon's loop may be waiting for it."""

    def __init__(self, index: Index, found: list[Segment], fault: faults.Fault) -> None:
        self.index, self._fault = index, fault
        self.lock = threading.Lock()
        #: told of keys that come or go, and which of both; `lock` is held
        self.told: Callable[[list[bytes], bool], object] = lambda keys, here: None
        self.segments: dict[int, Segment] = {}
        self._clock = 0
        for segment in found:
            self.segments[segment.number] = segment
            self.use(segment)

    def use(self, segment: Segment) -> None:
        """Now; the one that was not used for longest goes first."""
        self._clock += 1
        segment.used = self._clock

    def used_bytes(self) -> int:
        return sum(s.end for s in list(self.segments.values()))

    def add(self, segment: Segment) -> None:
        with self.lock:
            self.segments[segment.number] = segment
            self.use(segment)

    def find(self, record: ChunkRecord) -> Entry | None:
        """Where this very record stands, to be read: its segment stays open until done()."""
        with self.lock:
            entry = self.index.get(record.key)
            if entry is None or entry.place.record != record:
                return None
            entry.segment.readers += 1
            entry.hits += 1
            self.use(entry.segment)
            return entry

    def done(self, segment: Segment) -> None:
        with self.lock:
            segment.readers -= 1
            last = segment.doomed and segment.readers == 0
        if last:
            os.close(segment.fd)

    def touch(self, keys: list[bytes]) -> None:
        with self.lock:
            for key in keys:
                if (entry := self.index.get(key)) is not None:
                    entry.hits += 1
                    self.use(entry.segment)

    def written(self, segment: Segment, places: list[Place], end: int, moved: Entry | None) -> list[Place]:
        """These stand there now. Returns those that nobody wants any more: deleted while they were moved."""
        unwanted = []
        with self.lock:
            segment.end = end
            self.use(segment)
            for place in places:
                if self.index.get(place.record.key) is moved:
                    disk_index.note(self.index, segment, place)
                    self.told([place.record.key], True)
                else:
                    unwanted.append(place)
        return unwanted

    def take(self, key: bytes) -> Entry | None:
        """Out of the index; the disk has it still, see mark_dead()."""
        with self.lock:
            entry = self.index.pop(key, None)
            if entry is not None:
                disk_index.forget(entry)
                self.told([key], False)
            return entry

    def mark_dead(self, entry: Entry) -> None:
        """On the disk, too: it does not come back with a restart. Raises OSError and TierError."""
        with self.lock:
            if entry.segment.doomed:
                return
            entry.segment.readers += 1  # only so that the file stays open
        try:
            self._fault("disk.delete")
            dead = segments.header(entry.segment.number, entry.place.offset, entry.place.record, live=False)
            segments.write_record(entry.segment.fd, entry.place.offset, dead, [], time.monotonic() + 5)
        finally:
            self.done(entry.segment)

    def throw_away(self, segment: Segment) -> set[bytes]:
        """The file and all that the index says of it; returns the keys. First the file: what somebody deletes from now on must
        not stand in it at the next start. Both calls that take long, 10 ms for a segment's blocks, are made without the
        lock, for which the loop may be waiting."""
        segment.path.unlink(missing_ok=True)
        with self.lock:
            gone, segment.keys, segment.listed = (
                segment.keys,
                set(),
                None,
            )  # an index that is being written may still look
            for key in gone:
                del self.index[key]
            if gone:
                self.told(list(gone), False)
            del self.segments[segment.number]
            segment.doomed = True
            unread = segment.readers == 0
        if unread:
            os.close(segment.fd)
        return gone

    def close(self) -> None:
        """Readers that are still at it close their files themselves."""
        with self.lock:
            for segment in self.segments.values():
                if segment.readers == 0:
                    os.close(segment.fd)
                segment.doomed = True
            self.segments.clear()
            self.index = {}

"""The disk tier: segment files that only grow, an index in memory, whole segments thrown away when the cap is reached.

Bytes go straight between the page-aligned arena and the disk (O_DIRECT where the file system allows it). Writes come one
at a time: one stream is what a disk is fastest at, and a record is either whole or cut off at the next start. A read
takes the header along with the payload and believes neither the index nor the file: header, key and digests must agree.

Trouble stays here: a disk that is full, read-only or broken refuses writes (and is tried again later) while reads go on;
what cannot be read is dropped. `stats()["state"]` says what is wrong.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pdserve import log
from pdserve.errors import StartError
from pdserve.transfer import faults
from pdserve.transfer.allocator import PAGE, align
from pdserve.transfer.tiers import disk_index, segments
from pdserve.transfer.tiers.base import ChunkRecord, CorruptChunk, TierError, ToStore
from pdserve.transfer.tiers.disk_index import Entry, Segment
from pdserve.transfer.tiers.disk_room import KEEP_SHARE, MIN_SIZE, Room, grouped, real_room, room_of
from pdserve.transfer.tiers.disk_shelf import Shelf
from pdserve.transfer.tiers.segments import Place

DEFAULT_MIN_FREE = 1 << 30
RETRY_S = 5.0


class DiskTier:
    """See base.Tier. `indexed`: contains() is a look into a dictionary, so the daemon's loop may ask."""

    name = "disk"
    indexed = True

    def __init__(
        self,
        path: Path,
        size: int,
        *,
        min_free: int = DEFAULT_MIN_FREE,
        segment_bytes: int = 0,
        fault: faults.Fault = faults.none,
    ) -> None:
        if size < MIN_SIZE and not segment_bytes:
            raise StartError(
                f"a disk tier of {size} bytes is too small to be of use: give at least {MIN_SIZE >> 20} MiB"
            )
        self.path, self.size, self.min_free = path, size // PAGE * PAGE, min_free
        self._fault = fault
        #: told, on the thread that writes, of the keys that were thrown away to keep under the cap
        self.on_evicted: Callable[[set[bytes]], object] | None = None
        self._log = log.get("disk")
        self._writing = threading.Lock()  # whoever appends, evicts or rewrites files
        self._saving = threading.Lock()  # whoever writes the index file
        self._current: Segment | None = None
        self._state, self._retry_at = "ok", 0.0
        self._counts = dict.fromkeys(("evicted_chunks", "moved_chunks", "quarantined_chunks", "quarantined_bytes"), 0)
        self._closed = False
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock_file = self._take_lock()
            index, found, older = disk_index.load(path, self._log)
            room = real_room(path, self.size, min_free, sum(s.end for s in found))
        except OSError as e:
            raise TierError(f"the disk tier cannot use {path}: {e}") from e
        if room < self.size:
            words = "disk tier: %d MiB are asked for, but %s has room for %d MiB beside the %d MiB that stay free"
            self._log.warning(words, self.size >> 20, path, room >> 20, min_free >> 20)
        self.segment_bytes = align(segment_bytes or min(max(room // 64, 32 << 20), room // 4, 8 << 30))
        self._room = Room(path, self.size, min_free, self.segment_bytes)
        self._shelf = Shelf(index, found, fault)
        for entry in older:  # else a chunk that is deleted would come back from its older copy
            with contextlib.suppress(OSError, TierError):
                self._shelf.mark_dead(entry)
        self._saver = disk_index.Saver(self.save_index)

    # ---- the contract ----

    def contains(self, keys: list[bytes]) -> list[ChunkRecord | None]:
        index = self._shelf.index
        return [e.place.record if (e := index.get(k)) is not None else None for k in keys]

    def get(self, record: ChunkRecord, into: list[np.ndarray], deadline: float) -> bool:
        _in_time(deadline)
        entry = self._shelf.find(record)
        if entry is None:
            return False
        segment, place = entry.segment, entry.place
        try:
            head = segments.read_record(segment.fd, place, into, deadline)
        except OSError as e:
            self.quarantine(record.key)
            raise TierError(f"disk: reading {segment.path.name} at {place.offset}: {e}") from e
        finally:
            self._shelf.done(segment)
        found = segments.read_header(head, segment.number, place.offset)
        if found is None or not found[1] or found[0].record != record:
            if self._shelf.index.get(record.key) is not entry:
                return False  # deleted or moved while it was read
            if found is not None and found[0].record == record:
                self._shelf.take(record.key)  # the index is from before it was deleted
                return False
            self.quarantine(record.key, mark=False)
            raise CorruptChunk(f"disk: {segment.path.name} at {place.offset} does not hold what the index says")
        return True

    def put(self, record: ChunkRecord, payload: list[np.ndarray], deadline: float) -> bool:
        return self.put_many([(record, payload)], deadline)[0]

    def put_many(self, chunks: list[ToStore], deadline: float) -> list[bool]:
        """put() of several, in as few writes as may be. An error is that of all of them; some may be there all the same."""
        _in_time(deadline)
        new = {record.key: (record, payload) for record, payload in chunks if record.key not in self._shelf.index}
        if new and self._retry_at <= time.monotonic() and not self._closed:
            if not self._writing.acquire(timeout=max(0.0, deadline - time.monotonic())):
                raise TierError("disk: busy until the deadline passed")
            try:
                self._put([c for c in new.values() if c[0].key not in self._shelf.index], deadline)
            except OSError as e:
                self._failed(e)
                raise TierError(f"disk: {self._state}") from e
            finally:
                self._writing.release()
        index = self._shelf.index
        return [record.key not in new or record.key in index for record, _ in chunks]

    def delete(self, keys: list[bytes]) -> int:
        """Also on the disk: what was deleted does not come back with a restart."""
        gone = [e for k in keys if (e := self._shelf.take(k)) is not None]
        failed: Exception | None = None
        for entry in gone:
            try:
                self._shelf.mark_dead(entry)
            except (OSError, TierError) as e:
                failed = e
        if failed is not None:
            raise TierError(
                f"disk: out of use, but the disk does not take the marks ({failed}): what is not overwritten by then"
                " comes back with a restart; delete it again after that"
            ) from failed
        return len(gone)

    def stats(self) -> dict[str, int | float | str]:
        with self._shelf.lock:
            return {
                "chunks": len(self._shelf.index),
                "used_bytes": self._shelf.used_bytes(),
                "capacity_bytes": self.size,
                "state": self._state,
                "segments": len(self._shelf.segments),
                "direct": int(all(s.direct for s in self._shelf.segments.values())),
                **self._counts,
            }

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._saver.close()
        got = self._writing.acquire(timeout=5.0)
        try:
            if got:
                with contextlib.suppress(OSError):  # without it the next start scans
                    self.save_index()
            self._shelf.close()
        finally:
            if got:
                self._writing.release()
        os.close(self._lock_file)

    # ---- beyond the contract ----

    def touch(self, keys: list[bytes]) -> None:
        """The chunks were used elsewhere (in DRAM): a sign that their copies here are worth keeping, too."""
        if keys:
            self._shelf.touch(keys)

    def quarantine(self, key: bytes, *, mark: bool = True) -> None:
        """What stands there is wrong or unreadable: never looked at again, the space goes with its segment. `mark`: say so
        in its header, too; not when something else may stand there."""
        entry = self._shelf.take(key)
        if entry is not None:
            self._counts["quarantined_chunks"] += 1
            self._counts["quarantined_bytes"] += entry.place.total
            if mark:
                with contextlib.suppress(OSError, TierError):
                    self._shelf.mark_dead(entry)

    def records(self) -> list[ChunkRecord]:
        with self._shelf.lock:
            return [e.place.record for e in self._shelf.index.values()]

    def watch(self, told: Callable[[list[bytes], bool], object]) -> list[bytes]:
        """The keys that are here. From now on told(keys, whether they are here) says what changes, on any thread, in order."""
        with self._shelf.lock:
            self._shelf.told = told
            return list(self._shelf.index)

    def clear(self) -> int:
        with self._writing:
            (self.path / disk_index.FILE).unlink(missing_ok=True)
            self._current = None
            return sum(len(self._shelf.throw_away(segment)) for segment in list(self._shelf.segments.values()))

    def save_index(self) -> None:
        """The index as a file, so that the next start need not read every header. Checked when it is read."""
        with self._saving:
            disk_index.write(
                self.path, self._shelf.index, list(self._shelf.segments.values()), self._shelf.lock, self._fault
            )

    # ---- writing; self._writing is held ----

    def _put(self, chunks: list[ToStore], deadline: float) -> None:
        """What finds no room is left out."""
        for group in grouped(chunks, self.segment_bytes // 4):
            if self._make_room(sum(room_of(record) for record, _ in group), deadline):
                self._append(group, deadline)
                self._state = "ok"

    def _append(self, chunks: list[ToStore], deadline: float, moved: Entry | None = None) -> None:
        segment = self._segment_for(sum(room_of(record) for record, _ in chunks))
        places: list[Place] = []
        records: list[segments.Written] = []
        at = segment.end
        for record, payload in chunks:
            head = segments.header(segment.number, at, record)
            places.append(Place(at, len(head), record))
            records.append((head, payload))
            at = places[-1].end
        self._fault("disk.put.begin")
        try:
            segments.write_records(segment.fd, segment.end, records, deadline)
        except (OSError, TierError):
            # A part may stand there that the index does not know: deleting would not reach it, the next start would find it.
            with contextlib.suppress(OSError):
                os.ftruncate(segment.fd, segment.end)
            raise
        self._fault("disk.put.written")
        for place in self._shelf.written(segment, places, at, moved):
            self._shelf.mark_dead(Entry(segment, place))

    def _segment_for(self, total: int) -> Segment:
        current = self._current
        if current is not None and (current.end == PAGE or current.end + total <= self.segment_bytes):
            return current
        if current is not None:
            self._saver.ask()
        name = segments.SegmentName(segments.DISK_FORMAT, max(self._shelf.segments, default=0) + 1, time.time())
        path = self.path / f"{name.number:08d}.seg"
        fd, direct = segments.open_file(str(path), os.O_RDWR | os.O_CREAT | os.O_EXCL)
        segment = self._current = Segment(name, path, fd, direct)
        self._shelf.add(segment)
        segments.write_record(fd, 0, segments.first_page(name), [], time.monotonic() + 10)
        self._fault("disk.segment.created")
        return segment

    def _failed(self, error: OSError) -> None:
        """A write did not go through: say why, and leave the disk alone for a moment."""
        words = {errno.ENOSPC: "full", errno.EDQUOT: "full", errno.EROFS: "read-only"}
        state = words.get(error.errno or 0, f"failing: {error.strerror or error}")
        if state != self._state:
            self._log.warning("disk tier %s: writes are refused for now (%s); serving goes on", state, error)
        self._state, self._retry_at = state, time.monotonic() + RETRY_S
        current, self._current = self._current, None
        if (
            current is not None and current.end == PAGE and not current.keys
        ):  # not one more empty file with each attempt
            with contextlib.suppress(OSError):
                self._shelf.throw_away(current)

    def _make_room(self, total: int, deadline: float) -> bool:
        """Keeps under the cap and above the floor of free space by throwing the least used segments away."""
        limit = self._room.limit(len(self._shelf.index))
        if total > limit:
            return False
        while self._shelf.used_bytes() + total > limit or not self._room.is_free(total):
            victim = min(
                (s for s in self._shelf.segments.values() if s is not self._current), key=lambda s: s.used, default=None
            )
            if victim is None:
                victim, self._current = self._current, None
            if victim is None:
                if self._state != "no free space":
                    self._log.warning(
                        "disk tier: %s has less than %d MiB free; nothing is written", self.path, self.min_free >> 20
                    )
                self._state, self._retry_at = "no free space", time.monotonic() + RETRY_S
                return False
            self._evict(victim, deadline)
        return True

    def _evict(self, victim: Segment, deadline: float) -> None:
        """Throws a segment away, but carries those of its chunks over that were read since they were written."""
        budget = (victim.end - PAGE) // KEEP_SHARE
        with self._shelf.lock:
            hot = sorted(
                (self._shelf.index[k] for k in victim.keys if self._shelf.index[k].hits), key=lambda e: -e.hits
            )
        for entry in hot:
            budget -= entry.place.total
            if budget < 0 or self._room.free() < entry.place.total:
                break
            try:
                self._move(entry, deadline)
            except (OSError, TierError) as e:
                self._log.warning("disk tier: a chunk was not carried over: %s", e)
                break
        self._fault("disk.compact.unlink")
        gone = self._shelf.throw_away(victim)
        self._counts["evicted_chunks"] += len(gone)
        if self.on_evicted is not None:
            self.on_evicted(gone)

    def _move(self, entry: Entry, deadline: float) -> None:
        record = entry.place.record
        shards = [segments.aligned(record.shard_bytes)[: record.shard_bytes] for _ in record.digests]
        head = segments.read_record(entry.segment.fd, entry.place, shards, deadline)
        found = segments.read_header(head, entry.segment.number, entry.place.offset)
        if found is None or not found[1] or found[0].record != record:
            return
        self._fault("disk.compact.read")
        if self._current is entry.segment:
            self._current = None
        # Not verified by digest here: whoever reads it does that, whatever its place.
        self._append([(record, shards)], deadline, entry)
        self._counts["moved_chunks"] += 1
        self._fault("disk.compact.moved")
        self._shelf.mark_dead(entry)  # the file goes in a moment, unless we are killed before

    # ---- starting ----

    def _take_lock(self) -> int:
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(fd)
            raise StartError(f"another cache daemon already uses the disk tier in {self.path}") from e
        return fd


def _in_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TierError("disk: deadline passed")

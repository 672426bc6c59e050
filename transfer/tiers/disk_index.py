"""What the disk tier knows of its files: in memory, in a small file that saves the next start the reading, and how it is
found out from the segments themselves.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from blake3 import blake3

from pdserve.transfer import faults
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.tiers import segments
from pdserve.transfer.tiers.segments import Place

FILE = "index"
_MAGIC = b"pdserveJ"
#: how long close() waits for an index that is being written
_SAVE_S = 10.0
#: the least time between two savings: packing holds Python's lock, and requests wait for that. What the file does not know
#: after a crash is read from its headers, a few thousand in a fraction of a second.
EVERY_S = 5.0


class Segment:
    """One file. `used` is the clock of its last use: the segment with the lowest goes first."""

    __slots__ = ("direct", "doomed", "end", "fd", "keys", "listed", "name", "path", "readers", "used")

    def __init__(self, name: segments.SegmentName, path: Path, fd: int, direct: bool) -> None:
        self.name, self.path, self.fd, self.direct = name, path, fd, direct
        self.end = PAGE
        self.keys: set[bytes] = set()
        self.used = 0
        self.readers = 0
        self.doomed = False
        self.listed: msgspec.Raw | None = None  # its places as the index file has them, until they change

    @property
    def number(self) -> int:
        return self.name.number


class Entry(msgspec.Struct, gc=False, eq=False):
    """A chunk: where it stands, and how often it was read since it was written there."""

    segment: Segment
    place: Place
    hits: int = 0


class _Listed(msgspec.Struct, frozen=True, array_like=True):
    name: segments.SegmentName
    end: int
    used: int
    #: list[Place]; packed for itself, so that a segment that did not change need not be packed again
    places: msgspec.Raw


class _Content(msgspec.Struct, frozen=True, array_like=True):
    format: int
    segments: list[_Listed]


Index = dict[bytes, Entry]
_places = msgspec.msgpack.Decoder(list[Place])


def note(index: Index, segment: Segment, place: Place) -> Entry | None:
    """The newest copy of a key is the one that counts; returns the one that it takes the place of."""
    key = place.record.key
    old = index.get(key)
    if old is not None:
        forget(old)
    index[key] = Entry(segment, place)
    segment.keys.add(key)
    segment.listed = None
    return old


def forget(entry: Entry) -> None:
    """The entry is no longer its segment's."""
    entry.segment.keys.discard(entry.place.record.key)
    entry.segment.listed = None


class Saver:
    """Writes the index down in a thread of its own: whoever stores a chunk does not wait for that."""

    def __init__(self, save: Callable[[], None], every_s: float = EVERY_S) -> None:
        self._save, self._every_s = save, every_s
        self._asked, self._ending = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="pdserve-disk-index", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """At once, or when the last time is long enough ago."""
        self._asked.set()

    def close(self) -> None:
        """What was asked for and not begun is not done any more."""
        self._ending.set()
        self._asked.set()
        self._thread.join(_SAVE_S)

    def _run(self) -> None:
        while self._asked.wait():
            self._asked.clear()
            if self._ending.is_set():
                return
            with contextlib.suppress(OSError):  # without it the next start reads the headers
                self._save()
            self._ending.wait(self._every_s)


def write(folder: Path, index: Index, found: list[Segment], lock: threading.Lock, fault: faults.Fault) -> None:
    """The whole index as a file, in one piece or not at all. `lock` guards `index`, and is held for a segment at a time."""
    rows = []
    for s in found:
        with lock:
            end, used, packed = s.end, s.used, s.listed
            places = [] if packed else [index[k].place for k in s.keys]
        if packed is None:
            packed = msgspec.Raw(msgspec.msgpack.encode(sorted(places, key=lambda p: p.offset)))
            with lock:
                if s.end == end and len(s.keys) == len(places):
                    s.listed = packed
        rows.append(_Listed(s.name, end, used, packed))
    body = msgspec.msgpack.encode(_Content(segments.DISK_FORMAT, rows))
    fresh = folder / (FILE + ".new")
    with fresh.open("wb") as f:
        f.write(_MAGIC + blake3(body).digest() + body)
        f.flush()
        fault("disk.index.write")
    fault("disk.index.rename")
    fresh.replace(folder / FILE)


def _read(path: Path) -> list[_Listed]:
    """What the file says; nothing when there is none, or when it is damaged or of another version."""
    try:
        data = path.read_bytes()
        body = memoryview(data)[len(_MAGIC) + 32 :]
        if data[: len(_MAGIC)] != _MAGIC or blake3(body).digest() != data[len(_MAGIC) :][:32]:
            return []
        content = msgspec.msgpack.decode(body, type=_Content)
    except (OSError, msgspec.MsgspecError):
        return []
    return content.segments if content.format == segments.DISK_FORMAT else []


def load(folder: Path, log: logging.Logger) -> tuple[Index, list[Segment], list[Entry]]:
    """Every chunk in the folder, the segments, least used first, and older copies of the same chunks, of a daemon that was
    killed while it moved them. Headers are read only where the file says nothing."""
    files = sorted(folder.glob("[0-9]*.seg"))
    known = {s.name: s for s in _read(folder / FILE)}
    index: Index = {}
    found: list[Segment] = []
    older: list[Entry] = []
    told = time.monotonic()
    for done, file in enumerate(files):
        if time.monotonic() - told > 1:
            told = time.monotonic()
            log.info("reading segments: %d of %d", done, len(files))
        segment = _open(file, log)
        if segment is not None:
            older += _read_segment(index, segment, known.get(segment.name), log)
            found.append(segment)
    # Segments that the file does not know are newer than those that it does.
    clocks = {name.number: s.used for name, s in known.items()}
    found.sort(key=lambda s: (s.number not in clocks, clocks.get(s.number, s.number)))
    if files:
        log.info("%d chunks in %d segments of %s", len(index), len(found), folder)
    return index, found, older


def _known_places(known: _Listed) -> list[Place]:
    try:
        return _places.decode(known.places)
    except msgspec.MsgspecError:
        return []


def _open(file: Path, log: logging.Logger) -> Segment | None:
    try:
        fd, direct = segments.open_file(str(file), os.O_RDWR)
    except OSError as e:
        if e.errno not in (errno.EROFS, errno.EACCES):
            log.warning("segment %s cannot be opened: %s", file.name, e)
            return None
        fd, direct = segments.open_file(str(file), os.O_RDONLY)
    number = int(file.stem) if file.stem.isdigit() else -1
    try:
        page = segments.aligned(PAGE).data
        got = os.preadv(fd, [page], 0)
    except OSError as e:
        log.warning("segment %s cannot be read: %s", file.name, e)
        os.close(fd)
        return None
    name = segments.read_first_page(page[:got])
    if name is None or name.number != number:
        # Of another version, or damaged at its very start: nothing in it can be hit, and it must not eat the cap.
        log.warning("segment %s is not of this version or damaged: removed", file.name)
        os.close(fd)
        with contextlib.suppress(OSError):
            file.unlink()
        return None
    return Segment(name, file, fd, direct)


def _read_segment(index: Index, segment: Segment, known: _Listed | None, log: logging.Logger) -> list[Entry]:
    """Returns the older copies of what stands there."""
    size, replaced = os.fstat(segment.fd).st_size, []
    if known is not None and known.end <= size:
        for place in _known_places(known):
            if place.end <= known.end:
                replaced.append(note(index, segment, place))
        segment.end = known.end
    for item in _scan(segment, size, log):
        if isinstance(item, int):
            segment.end = item
        elif item.live:
            replaced.append(note(index, segment, item.place))
    if size > segment.end:
        log.info("segment %s: a torn tail of %d bytes is cut off", segment.path.name, size - segment.end)
        with contextlib.suppress(OSError):
            os.ftruncate(segment.fd, segment.end)
    return [entry for entry in replaced if entry is not None]


def _scan(segment: Segment, size: int, log: logging.Logger) -> Iterator[segments.Scanned | int]:
    try:
        yield from segments.scan(segment.fd, segment.number, segment.end, size)
    except OSError as e:
        log.warning("segment %s cannot be read to its end: %s", segment.path.name, e)
        yield size  # nothing is cut off: it may be readable another time

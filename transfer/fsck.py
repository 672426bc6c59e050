"""Looks through a disk tier that no daemon uses: every header, every byte against its digest. Changes nothing unless told to."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from pdserve import kernels
from pdserve.errors import StartError
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.tiers import disk_index, segments
from pdserve.transfer.tiers.base import TierError


class Report(msgspec.Struct):
    segments: int = 0
    chunks: int = 0
    bytes: int = 0
    deleted: int = 0
    problems: list[str] = msgspec.field(default_factory=list)
    repaired: int = 0


def check(folder: Path, *, repair: bool = False, progress: Callable[[str], None] = lambda line: None) -> Report:
    """Raises StartError when there is no store, or when a daemon uses it. `repair` marks wrong records as deleted, cuts torn
    tails off and removes files that are no segments; the index is then made anew at the next start."""
    report = Report()
    try:  # looking is possible on a disk that is mounted read-only, too
        lock = os.open(folder / "lock", (os.O_RDWR if repair else os.O_RDONLY) | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise StartError(f"{folder} holds no disk tier. Give the folder of --disk, or <run dir>/<name>/kv.") from e
    except OSError as e:
        raise StartError(f"the disk tier in {folder} cannot be {'repaired' if repair else 'read'}: {e.strerror}") from e
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise StartError(f"a cache daemon uses {folder}: stop it first, or ask it (pdserve cache scrub)") from e
        for file in sorted(folder.glob("[0-9]*.seg")):
            progress(f"{file.name}: {report.chunks} chunks so far, {len(report.problems)} problems")
            _segment(file, report, repair)
        if repair and report.repaired:
            (folder / disk_index.FILE).unlink(missing_ok=True)
    finally:
        os.close(lock)
    return report


def _segment(file: Path, report: Report, repair: bool) -> None:
    fd, _ = segments.open_file(str(file), os.O_RDWR if repair else os.O_RDONLY)
    try:
        report.segments += 1
        size = os.fstat(fd).st_size
        page = segments.aligned(PAGE).data
        name = segments.read_first_page(page[: os.preadv(fd, [page], 0)])
        if name is None or f"{name.number:08d}.seg" != file.name:
            report.problems.append(f"{file.name}: not a segment of this version, or its first page is damaged")
            if repair:
                file.unlink()
                report.repaired += 1
            return
        expected = PAGE
        for item in segments.scan(fd, name.number, PAGE, size):
            if isinstance(item, int):
                _tail(fd, file, item, size, report, repair)
                return
            if item.place.offset != expected:
                report.problems.append(
                    f"{file.name}: damaged header at {expected}, {item.place.offset - expected} bytes lost"
                )
            expected = item.place.end
            if not item.live:
                report.deleted += 1
                continue
            _record(fd, file, name.number, item.place, report, repair)
    except OSError as e:
        report.problems.append(f"{file.name}: {e}")
    finally:
        os.close(fd)


def _tail(fd: int, file: Path, end: int, size: int, report: Report, repair: bool) -> None:
    if size > end:
        report.problems.append(f"{file.name}: torn tail of {size - end} bytes")
        if repair:
            os.ftruncate(fd, end)
            report.repaired += 1


def _record(fd: int, file: Path, number: int, place: segments.Place, report: Report, repair: bool) -> None:
    record = place.record
    shards = [segments.aligned(record.shard_bytes)[: record.shard_bytes] for _ in record.digests]
    deadline = time.monotonic() + 60
    try:
        segments.read_record(fd, place, shards, deadline)
        right = [kernels.digest(shard) for shard in shards] == record.digests
    except (OSError, TierError) as e:
        report.problems.append(f"{file.name}: {e} at {place.offset}")
        right = False
    else:
        if not right:
            report.problems.append(f"{file.name}: digest mismatch at {place.offset}, key {record.key.hex()[:16]}")
    if right:
        report.chunks += 1
        report.bytes += record.payload_bytes
    elif repair:
        dead = segments.header(number, place.offset, record, live=False)
        segments.write_record(fd, place.offset, dead, [], deadline)
        report.repaired += 1

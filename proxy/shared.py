"""What worker processes of one proxy know of each other: counts in a mapped file, instances taken in and out in another.

Counts: every worker has a row of its own, which only it writes, so nothing is locked; a name has a column by its hash.
A worker that was killed leaves its row behind: the parent clears it (workers.py). One process alone needs none of it, and
Alone says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

ROWS, COLUMNS = 64, 4096
_SIZE = ROWS * COLUMNS * 4
Listed = dict[str, tuple[str, str]]  # name -> role, url


class Shared(Protocol):
    @property
    def folder(self) -> Path | None:
        """What the workers share; None where there is only one process."""

    @property
    def row(self) -> int:
        """Which of them this one is."""

    def add(self, name: str, by: int) -> None:
        """Changes this worker's count of `name`."""

    def others(self, name: str) -> int:
        """The other workers' counts of `name`."""

    def listed(self) -> Listed | None:
        """The instances that there are to be, if that was changed since the last call; else None."""

    def change(self, name: str, instance: tuple[str, str] | None, now: Listed) -> None:
        """Tells the others that an instance was taken in, or out (None). `now` is this worker's list before it."""


class Alone:
    folder: Path | None = None
    row = 0

    def add(self, name: str, by: int) -> None:
        pass

    def others(self, name: str) -> int:
        return 0

    def listed(self) -> Listed | None:
        return None

    def change(self, name: str, instance: tuple[str, str] | None, now: Listed) -> None:
        pass


class Together:
    """Worker number `row` of those that share `folder`."""

    def __init__(self, folder: Path, row: int) -> None:
        self.folder, self.row = folder, row
        self._row, self._list = row, folder / "instances.json"
        self._lock = folder / "lock"
        self._seen = 0
        descriptor = os.open(folder / "counts", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, _SIZE)
            self._map = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)
        self._counts = memoryview(self._map).cast("i")
        self._counts[row * COLUMNS : (row + 1) * COLUMNS] = memoryview(bytes(COLUMNS * 4)).cast("i")

    def add(self, name: str, by: int) -> None:
        self._counts[self._row * COLUMNS + column(name)] += by

    def others(self, name: str) -> int:
        at = column(name)
        return sum(self._counts[at::COLUMNS]) - self._counts[self._row * COLUMNS + at]

    def listed(self) -> Listed | None:
        try:
            changed = self._list.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        if changed == self._seen:
            return None
        self._seen = changed
        return {name: (role, url) for name, (role, url) in json.loads(self._list.read_text()).items()}

    def change(self, name: str, instance: tuple[str, str] | None, now: Listed) -> None:
        with self._locked():
            listed = json.loads(self._list.read_text()) if self._list.exists() else dict(now)
            listed.pop(name, None)
            if instance is not None:
                listed[name] = instance
            new = self._list.with_suffix(f".{self._row}")
            new.write_text(json.dumps(listed))
            new.rename(self._list)
            self._seen = self._list.stat().st_mtime_ns

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # held for the writing of one small file
            yield

    def close(self) -> None:
        self._counts.release()
        self._map.close()


def clear(folder: Path, row: int) -> None:
    """The worker of that row is gone."""
    with contextlib.suppress(FileNotFoundError), (folder / "counts").open("r+b") as counts:
        counts.seek(row * COLUMNS * 4)
        counts.write(bytes(COLUMNS * 4))


def column(name: str) -> int:
    return zlib.crc32(name.encode()) % COLUMNS

"""What was seen: the latest picture and an hour of samples, as JSON bytes that are given out as they are.

A proxy that is one process keeps them in memory. Several workers share a folder: whoever holds its lock looks and writes,
the others read; when that one goes, another takes the lock and goes on with the samples that are there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections import deque
from pathlib import Path
from typing import IO, Protocol

LENGTH = 1800  # samples: an hour, at one in two seconds
_WATCHED_FOR = 5.0  # after the last sign of somebody who looks


class Board(Protocol):
    def leads(self) -> bool:
        """Whether this process is the one that looks."""

    def publish(self, picture: bytes, sample: bytes) -> None:
        """A new picture, and a new sample if there is one."""

    def picture(self) -> bytes: ...

    def samples(self) -> list[bytes]:
        """Oldest first."""

    def watch(self) -> None:
        """Tells that somebody looks now."""

    def watched(self) -> bool: ...

    def close(self) -> None: ...


class Memory:
    def __init__(self) -> None:
        self._picture = b""
        self._samples: deque[bytes] = deque(maxlen=LENGTH)
        self._last = -_WATCHED_FOR

    def leads(self) -> bool:
        return True

    def publish(self, picture: bytes, sample: bytes) -> None:
        self._picture = picture
        if sample:
            self._samples.append(sample)

    def picture(self) -> bytes:
        return self._picture

    def samples(self) -> list[bytes]:
        return list(self._samples)

    def watch(self) -> None:
        self._last = time.monotonic()

    def watched(self) -> bool:
        return time.monotonic() - self._last < _WATCHED_FOR

    def close(self) -> None:
        pass


class Folder:
    """Samples are appended to a file, one a line; a full one becomes the old one, so there are two at the most."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True, mode=0o700)
        self._lock: IO[str] = (folder / "lock").open("a")
        self._leads = False
        self._lines = 0
        (folder / "watched").touch()
        os.utime(folder / "watched", (0, 0))

    def leads(self) -> bool:
        if not self._leads:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            self._leads = True
            self._lines = len(self._read("samples"))
        return True

    def publish(self, picture: bytes, sample: bytes) -> None:
        scratch = self._folder / "picture.new"
        scratch.write_bytes(picture)
        scratch.replace(self._folder / "picture")
        if not sample:
            return
        if self._lines >= LENGTH:
            (self._folder / "samples").replace(self._folder / "samples.old")
            self._lines = 0
        with (self._folder / "samples").open("ab") as file:
            file.write(sample + b"\n")
        self._lines += 1

    def picture(self) -> bytes:
        try:
            return (self._folder / "picture").read_bytes()
        except FileNotFoundError:
            return b""

    def samples(self) -> list[bytes]:
        return (self._read("samples.old") + self._read("samples"))[-LENGTH:]

    def _read(self, name: str) -> list[bytes]:
        """Whole lines only: one may be being written, or its writer may have died in the middle of it."""
        with contextlib.suppress(FileNotFoundError):
            return [line for line in (self._folder / name).read_bytes().split(b"\n") if line.endswith(b"}")]
        return []

    def watch(self) -> None:
        (self._folder / "watched").touch()

    def watched(self) -> bool:
        return time.time() - (self._folder / "watched").stat().st_mtime < _WATCHED_FOR

    def close(self) -> None:
        self._lock.close()  # and with it the lock

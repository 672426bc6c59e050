"""A file that grows at its end by copying into its own mapping.

No system call for what is appended, so Python's lock is not let go: whoever appends in the middle of a request would
otherwise wait until another thread hands it back. What is in the file stays when the process is killed. Behind its end
there are zeros, since room is taken ahead; its reader must know an end when it sees one.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path

#: room that is taken at a time
AHEAD = 256 << 10


class AppendFile:
    """Opened and locked; what is in it stays until something is appended at `length`. Raises OSError where there is no room."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.length = 0
        self._map: mmap.mmap | None = None
        self._room = 0
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if fresh else 0), 0o600)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.fd)
            raise

    def read(self) -> bytes:
        return os.pread(self.fd, os.fstat(self.fd).st_size, 0)

    def append(self, data: bytes) -> None:
        end = self.length + len(data)
        if end > self._room:
            self._take(-(-end // AHEAD) * AHEAD)
        assert self._map is not None
        self._map[self.length : end] = data
        self.length = end

    def empty(self) -> None:
        """Nothing is in it any more, and nothing may be appended."""
        self._unmap()
        os.ftruncate(self.fd, 0)

    def close(self) -> None:
        self._unmap()
        os.close(self.fd)

    def _take(self, room: int) -> None:
        os.posix_fallocate(self.fd, self._room, room - self._room)  # else a full file system shows as a signal
        if self._map is None:
            self._map = mmap.mmap(self.fd, room)
        else:
            self._map.resize(room)
        self._room = room

    def _unmap(self) -> None:
        if self._map is not None:
            self._map.close()
        self._map = None

"""The shared memory that all engines of a host and the daemon map: one file in /dev/shm, touched in full at the start.

First touch of fresh shared pages runs at about a fifth of the speed of later writes, so the daemon pays it once, before
it says that it is ready.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pdserve.errors import CacheUnavailable, StartError

SHM = Path("/dev/shm")
_STEP = 64 << 20


def path_for(name: str) -> Path:
    """Where the arena of the deployment `name` lives."""
    return SHM / f"pdserve-{name}.arena"


def free_shared_memory() -> int:
    """Bytes that /dev/shm can still take."""
    usage = os.statvfs(SHM)
    return usage.f_bavail * usage.f_frsize


def _free_memory() -> int:
    """Bytes that the machine can give without swapping; what /dev/shm allows may be more."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62  # a kernel that does not say


class Arena:
    """A mapping of the arena; `bytes` is a uint8 array over all of it. Close it only when nobody copies any more."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self._mapping = mapping
        self.bytes = np.frombuffer(mapping, dtype=np.uint8)

    @property
    def size(self) -> int:
        return self.bytes.size

    def close(self) -> None:
        # numpy holds the buffer; the mapping goes when the last array over it does.
        self.bytes = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):
            self._mapping.close()


def create(path: Path, size: int, progress: Callable[[int], None] = lambda done: None) -> Arena:
    """Makes the file anew (what an earlier process left is unlinked, not reused) and touches every page.

    Raises StartError when /dev/shm cannot hold it. `progress` is told the bytes done.
    """
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    _need(size)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        for start in range(0, size, _STEP):
            # Allocates the pages for real: running out of memory later would be a SIGBUS in an engine.
            os.posix_fallocate(fd, start, min(_STEP, size - start))
            progress(min(start + _STEP, size))
        mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    except (OSError, ValueError) as e:
        path.unlink()
        raise _too_large(size, f"{e}; {free_shared_memory() / 2**30:.2f} GiB are free") from e
    except BaseException:  # told to end meanwhile: nobody else knows of the file
        path.unlink()
        raise
    finally:
        os.close(fd)
    return Arena(path, mapping)


def _need(size: int) -> None:
    """Before the first page is taken: filling memory up would end other processes first, not this one."""
    free, memory = free_shared_memory(), _free_memory()
    if size > min(free, memory):
        raise _too_large(
            size, f"{free / 2**30:.2f} GiB are free there, and {memory / 2**30:.2f} GiB of the machine's memory"
        )


def _too_large(size: int, why: str) -> StartError:
    return StartError(
        f"cannot take {size / 2**30:.2f} GiB in {SHM} ({why}). Lower cache.size (--size), or enlarge {SHM}."
    )


def reopen(path: Path, size: int) -> Arena | None:
    """The arena that an earlier daemon left, with its bytes; None when there is none of this size."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(fd).st_size != size or os.fstat(fd).st_uid != os.getuid():
            return None
        return Arena(path, mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)


def attach(path: Path, size: int) -> Arena:
    """Maps the daemon's arena, page tables filled at once. Raises CacheUnavailable when it is not there or not that size."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise CacheUnavailable(f"cannot open the arena {path}: {e}") from e
    try:
        if (actual := os.fstat(fd).st_size) != size:
            raise CacheUnavailable(f"the arena {path} has {actual} bytes, the daemon said {size}")
        return Arena(path, mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
    except (OSError, ValueError) as e:
        raise CacheUnavailable(f"cannot map the arena {path}: {e}") from e
    finally:
        os.close(fd)

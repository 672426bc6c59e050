"""The shared memory that all engines of a host and the daemon map: one file in /dev/shm, allocated in full at the start.

First touch of fresh shared pages runs at about a fifth of the speed of later writes, so the daemon pays it once, before
it says that it is ready. It asks for huge pages, which are given, mapped and written faster; where there are none, small ones
serve.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pdserve.errors import CacheUnavailable, StartError
from pdserve.transfer import memory_group
from pdserve.transfer.mapping import Mapping, huge_bytes, huge_page

SHM = Path("/dev/shm")
_STEP = 64 << 20
#: So many steps in a row that no huge page is to be had for: then it is not asked any more, since the kernel looks long for each.
_REFUSALS = 4


def path_for(name: str) -> Path:
    """Where the arena of the deployment `name` lives."""
    return SHM / f"pdserve-{name}.arena"


def free_shared_memory() -> int:
    """Bytes that /dev/shm can still take."""
    usage = os.statvfs(SHM)
    return usage.f_bavail * usage.f_frsize


def _free_memory() -> int:
    """Bytes that the machine and our control group can give without swapping; what /dev/shm allows may be more."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, memory_group.left())
    return memory_group.left()  # a kernel that does not say


class Arena:
    """A mapping of the arena; `bytes` is a uint8 array over all of it. Close it only when nobody copies any more."""

    def __init__(self, path: Path, mapping: Mapping) -> None:
        self.path = path
        self.bytes = mapping.bytes()

    @property
    def size(self) -> int:
        return self.bytes.size

    def huge_bytes(self) -> int:
        """How much of it is mapped in huge pages. Takes milliseconds a GiB where it is not."""
        return huge_bytes(self.bytes.ctypes.data, self.size)

    def close(self) -> None:
        """The mapping goes when the last array over it does."""
        self.bytes = np.empty(0, np.uint8)


def create(path: Path, size: int, progress: Callable[[int], None] = lambda done: None) -> Arena:
    """Makes the file anew (what an earlier process left is unlinked, not reused) and allocates every page.

    Raises StartError when /dev/shm cannot hold it. `progress` is told the bytes done.
    """
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    _need(size)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
        mapping = Mapping(fd, size, populate=False)
        _fill(fd, mapping, progress)
        mapping.populate(fd)
    except (OSError, ValueError) as e:
        path.unlink()
        raise _too_large(size, f"{e}; {free_shared_memory() / 2**30:.2f} GiB are free") from e
    except BaseException:  # told to end meanwhile: nobody else knows of the file
        path.unlink()
        raise
    finally:
        os.close(fd)
    return Arena(path, mapping)


def _fill(fd: int, mapping: Mapping, progress: Callable[[int], None]) -> None:
    """Every page for real, huge where the kernel has them."""
    size, unit = mapping.size, huge_page()
    step = max(_STEP, unit)
    refusals = 0 if unit else _REFUSALS
    for start in range(0, size, step):
        end = min(start + step, size)
        if refusals < _REFUSALS and end - start >= unit:
            code = _ask_for_huge(fd, mapping, start, (end - start) // unit, unit)
            refusals = 0 if not code else _REFUSALS if code == errno.EINVAL else refusals + 1
        # What came as huge pages is there already. Running out of memory later would be a SIGBUS in an engine.
        os.posix_fallocate(fd, start, end - start)
        progress(end)


def _ask_for_huge(fd: int, mapping: Mapping, start: int, count: int, unit: int) -> int:
    """Returns 0 or the errno. A small page in each makes it one that the kernel can collapse, around that page and nothing else."""
    for page in range(start, start + count * unit, unit):
        os.posix_fallocate(fd, page, 1)
    return mapping.collapse(start, count * unit)


def huge_page_trial() -> int:
    """Asks for one huge page in /dev/shm and gives it back. Returns 0 or the errno. Raises OSError where there is no room for it."""
    if not (unit := huge_page()):
        return errno.ENOSYS
    fd = os.open(SHM, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, unit)
        mapping = Mapping(fd, unit, populate=False)
        code = _ask_for_huge(fd, mapping, 0, 1, unit)
        mapping.populate(fd)
        return 0 if huge_bytes(mapping.address, unit) == unit else code or errno.EAGAIN
    finally:
        os.close(fd)


def _need(size: int) -> None:
    """Before the first page is taken: filling memory up would end other processes first, not this one."""
    free, memory = free_shared_memory(), _free_memory()
    if size > min(free, memory):
        raise _too_large(
            size,
            f"{free / 2**30:.2f} GiB are free there, and {memory / 2**30:.2f} GiB of the memory that the machine and our"
            " control group (a container's limit) have",
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
        return Arena(path, Mapping(fd, size))
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
        return Arena(path, Mapping(fd, size))
    except (OSError, ValueError) as e:
        raise CacheUnavailable(f"cannot map the arena {path}: {e}") from e
    finally:
        os.close(fd)

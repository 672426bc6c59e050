"""A file of shared memory, mapped where huge pages can be mapped: at an address that is a whole number of them.

Python's mmap takes no address. And a kernel that gives small pages to shared memory by default (it nearly always does, and the
default is the machine owner's to change) collapses them into huge ones when it is asked to, by whoever may write the file.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np

_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_SMAPS = Path("/proc/self/smaps")
_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")
_PROT_NONE, _MAP_FIXED = 0, 0x10
_MADV_COLLAPSE = 25  # Linux 6.1; heeds no setting but `deny`

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value


def huge_page() -> int:
    """Bytes of a huge page; 0 on a kernel without."""
    try:
        return int(_SIZE.read_text())
    except (OSError, ValueError):
        return 0


class Mapping:
    """Maps `size` bytes of the open file `fd`, shared. The memory goes when this and the last array over it are gone; until then
    copies are safe, whoever closes what. Raises OSError."""

    def __init__(self, fd: int, size: int, *, populate: bool = True) -> None:
        if size <= 0:
            raise OSError(errno.EINVAL, f"cannot map {size} bytes")
        self.size = size
        unit = max(huge_page(), mmap.PAGESIZE)
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        # Room that is ours, with an aligned address somewhere in it; what lies before and behind is given back.
        room = _map(None, whole + unit, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self.address = -(-room // unit) * unit
        try:
            self._map(fd, populate)
        except OSError:
            _unmap(room, whole + unit)
            raise
        if before := self.address - room:
            _unmap(room, before)
        if behind := unit - before:
            _unmap(self.address + whole, behind)
        # Not at the interpreter's end: threads may be copying still, and the process's end does it.
        weakref.finalize(self, _unmap, self.address, whole).atexit = False

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"data": (self.address, False), "shape": (self.size,), "typestr": "|u1", "version": 3}

    def bytes(self) -> np.ndarray:
        """All of it, as uint8. Keeps the mapping alive, as does whatever is made of it."""
        return np.asarray(self)

    def populate(self, fd: int) -> None:
        """Fills the page tables, in the size that the file's pages have by now."""
        self._map(fd, True)

    def _map(self, fd: int, populate: bool) -> None:
        flags = mmap.MAP_SHARED | _MAP_FIXED | (mmap.MAP_POPULATE if populate else 0)
        _map(self.address, self.size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd)

    def collapse(self, start: int, length: int) -> int:
        """Asks for huge pages in that part, whole ones; each must have a page already, if a small one. Returns 0 or the errno:
        ENOMEM or EBUSY where there are not enough, EINVAL where there is no such thing. Some may have come nevertheless."""
        if _libc.madvise(self.address + start, length, _MADV_COLLAPSE) == 0:
            return 0
        return ctypes.get_errno()


def huge_bytes(address: int, size: int) -> int:
    """How much of this shared memory is mapped in huge pages; 0 also where the kernel does not say."""
    found, inside = 0, False
    try:
        with _SMAPS.open() as lines:
            for line in lines:
                if heads := _RANGE.match(line):
                    inside = int(heads[1], 16) < address + size and address < int(heads[2], 16)
                elif inside and line.startswith("ShmemPmdMapped:"):
                    found += int(line.split()[1]) * 1024
    except OSError:
        return 0
    return found


def _map(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    got = _libc.mmap(address, size, protection, flags, fd, 0)
    if got == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot map {size} bytes: {os.strerror(code)}")
    return int(got)


def _unmap(address: int, size: int) -> None:
    _libc.munmap(address, size)

"""Bytes from a socket into memory, and their digest in the same pass: the receiving side of a transport.

A piece's digest is a sum over its words (csrc/digest.h), so segments that come in any order, on any thread, each bring their own
part of it, and finish() makes the digest of the parts' sum. Nothing is read a second time.

There is no slower twin of this one: without a compiler available() is False and the caller receives in its own way and lets
kernels.digest read the piece when it is complete.
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

import numpy as np

from . import build


class Arrival(ctypes.Structure):
    """How far a segment has come; see csrc/receive.cpp. Make a new one for each."""

    _fields_ = (
        ("done", ctypes.c_uint64),
        ("digested", ctypes.c_uint64),
        ("sum", ctypes.c_uint64),
        ("beyond", ctypes.c_uint64),
    )


_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_tried = False


def _load() -> ctypes.CDLL | None:
    global _library, _tried
    if _tried:
        return _library
    with _lock:
        if not _tried:
            root = Path(os.environ.get("PDSERVE_HOME") or Path.home() / ".cache" / "pdserve") / "build"
            try:
                _library = _bound(ctypes.CDLL(str(build.receive_library(root))))
            except (build.BuildError, OSError):
                _library = None  # kernels.path() tells the user that there is no compiler, and why
            _tried = True
    return _library


def _bound(library: ctypes.CDLL) -> ctypes.CDLL:
    library.pd_receive.restype = ctypes.c_int64
    library.pd_receive.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_uint64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.pd_finish.restype = library.pd_sum.restype = ctypes.c_uint64
    library.pd_finish.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
    library.pd_sum.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64]
    return library


def available() -> bool:
    """Whether there is compiled code; compiles it if need be."""
    return _load() is not None


def receive(fd: int, to: np.ndarray, following: np.ndarray, word: int, patience_s: float, arrival: Arrival) -> bool:
    """Receives into `to`, going on where `arrival` stands, until it is full (True) or the time is over (False).

    What comes beyond lies in `following` then, arrival.beyond bytes. On TCP it sleeps until 1 MiB is there, or all that is left.
    `word`: position in its piece of the first word of `to`. Raises OSError, ConnectionError when the peer has closed.
    """
    library = _load()
    assert library is not None
    at, size, more, room = to.ctypes.data, to.nbytes, following.ctypes.data, following.nbytes
    got: int = library.pd_receive(fd, at, size, more, room, word, int(patience_s * 1e9), ctypes.addressof(arrival))
    if got < 0:
        raise OSError(-got, os.strerror(-got))
    return got == 1


def part(data: np.ndarray, word: int) -> int:
    """The same sum of a segment that is there already."""
    library = _load()
    assert library is not None
    return int(library.pd_sum(data.ctypes.data, data.nbytes, word))


def finish(total: int, nbytes: int) -> int:
    """The digest of a piece of `nbytes` whose parts add up to `total`."""
    library = _load()
    assert library is not None
    return int(library.pd_finish(total & 0xFFFFFFFFFFFFFFFF, nbytes))

"""Moving KV blocks and guarding them: gather (paged blocks -> one chunk), scatter (chunk -> paged blocks), digest.

Each call goes over the bytes once. `path()` says which code serves: "native" (compiled for this CPU) or "numpy"
(no compiler found; the same results, several times slower). Imports nothing of ours, no torch.
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

import numpy as np

from . import build, reference, rounded

_lock = threading.Lock()
_native: ctypes.CDLL | None = None
_why_not = ""
_tried = False


def _load() -> ctypes.CDLL | None:
    global _native, _tried, _why_not
    if _tried:
        return _native
    with _lock:
        if _tried:
            return _native
        root = Path(os.environ.get("PDSERVE_HOME") or Path.home() / ".cache" / "pdserve") / "build"
        try:
            lib = ctypes.CDLL(str(build.cpu_library(root)))
            lib.pd_gather.restype = lib.pd_scatter.restype = lib.pd_digest.restype = ctypes.c_uint64
            lib.pd_gather.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
            lib.pd_scatter.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
            lib.pd_digest.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
            shape = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_int]
            lib.pd_gather_rounded.restype = lib.pd_scatter_rounded.restype = ctypes.c_uint64
            lib.pd_gather_rounded.argtypes = [ctypes.c_void_p, *shape, ctypes.c_void_p]
            lib.pd_scatter_rounded.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *shape]
            _native = lib
        except (build.BuildError, OSError) as e:
            _why_not = str(e)
        _tried = True
    return _native


def path() -> tuple[str, str]:
    """("native", "") or ("numpy", why the native code is not used)."""
    return ("native", "") if _load() else ("numpy", _why_not)


def digest(data: np.ndarray) -> int:
    """64-bit digest of a contiguous array's bytes."""
    lib = _load()
    if lib is None:
        return reference.digest(data)
    assert data.flags.c_contiguous
    return int(lib.pd_digest(data.ctypes.data, data.nbytes))


def gather(addresses: np.ndarray, nbytes: int, to: np.ndarray) -> int:
    """Copies `len(addresses)` pieces of `nbytes` (a multiple of 8) into `to`, in order; returns the digest of what was written.

    addresses: uint64 [n], host addresses whose memory the caller keeps alive; to: uint8, contiguous, >= n * nbytes.
    """
    _check(addresses, nbytes, to)
    lib = _load()
    if lib is None:
        return reference.gather(addresses, nbytes, to)
    return int(lib.pd_gather(addresses.ctypes.data, addresses.size, nbytes, to.ctypes.data))


def scatter(source: np.ndarray, addresses: np.ndarray, nbytes: int) -> int:
    """Copies `source` to the pieces at `addresses` (0 = leave that piece out); returns the digest of all of `source`.

    The caller compares the digest before anything may read the pieces.
    """
    _check(addresses, nbytes, source)
    lib = _load()
    if lib is None:
        return reference.scatter(source, addresses, nbytes)
    return int(lib.pd_scatter(source.ctypes.data, addresses.ctypes.data, addresses.size, nbytes))


def gather_rounded(
    addresses: np.ndarray, rows: int, values: int, payload: str, dtype: str, to: np.ndarray
) -> int:
    """gather() with a rounded payload (csrc/rounded.h): pieces of `rows` rows of `values` values of type `dtype`."""
    _check(addresses, rows * rounded.row_bytes(values), to)
    rounded.groups(values)
    lib = _load()
    if lib is None:
        return reference.gather_rounded(addresses, rows, values, payload, dtype, to)
    shape = (addresses.size, rows, values, rounded.code(payload, dtype))
    return int(lib.pd_gather_rounded(addresses.ctypes.data, *shape, to.ctypes.data))


def scatter_rounded(
    source: np.ndarray, addresses: np.ndarray, rows: int, values: int, payload: str, dtype: str
) -> int:
    """scatter() of what gather_rounded() made."""
    _check(addresses, rows * rounded.row_bytes(values), source)
    rounded.groups(values)
    lib = _load()
    if lib is None:
        return reference.scatter_rounded(source, addresses, rows, values, payload, dtype)
    shape = (addresses.size, rows, values, rounded.code(payload, dtype))
    return int(lib.pd_scatter_rounded(source.ctypes.data, addresses.ctypes.data, *shape))


def _check(addresses: np.ndarray, nbytes: int, area: np.ndarray) -> None:
    # These are raw addresses: a wrong size here would be memory corruption, so the checks stay in production.
    if addresses.dtype != np.uint64 or not addresses.flags.c_contiguous:
        raise ValueError("addresses must be a contiguous uint64 array")
    if nbytes <= 0 or nbytes % 8:
        raise ValueError(f"piece size {nbytes} is not a positive multiple of 8")
    if area.dtype != np.uint8 or not area.flags.c_contiguous or area.size < addresses.size * nbytes:
        raise ValueError(
            f"area must be contiguous uint8 of at least {addresses.size * nbytes} bytes, got {area.dtype} {area.size}"
        )

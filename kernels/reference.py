"""Gather, scatter and digest in plain numpy: the fallback where no compiler is, and the oracle of the tests.

The digest's definition is in csrc/digest.h; this is the same formula, word by word.
"""

from __future__ import annotations

import ctypes

import numpy as np

from . import rounded

_STEP, _MUL_A, _MUL_B = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F))
_U32, _U29 = np.uint64(32), np.uint64(29)
_SLICE_WORDS = 1 << 15  # 256 KiB at a time: temporaries stay in the cache


def _mix(x: np.ndarray) -> np.ndarray:
    x ^= x >> _U32
    x *= _MUL_A
    x ^= x >> _U29
    x *= _MUL_B
    x ^= x >> _U32
    return x


def digest(data: np.ndarray | bytes | memoryview) -> int:
    """64-bit digest of `data`, any length."""
    flat = np.frombuffer(data, dtype=np.uint8) if not isinstance(data, np.ndarray) else data.reshape(-1).view(np.uint8)
    whole = flat.size // 8 * 8
    total = 0
    words = flat[:whole].view(np.uint64)
    for start in range(0, words.size, _SLICE_WORDS):
        part = words[start : start + _SLICE_WORDS]
        position = np.arange(start + 1, start + 1 + part.size, dtype=np.uint64)
        total += int(_mix(part + position * _STEP).sum(dtype=np.uint64))
    if whole < flat.size:
        last = np.zeros(8, dtype=np.uint8)
        last[: flat.size - whole] = flat[whole:]
        position = np.full(1, words.size + 1, dtype=np.uint64)
        total += int(_mix(last.view(np.uint64) + position * _STEP)[0])
    tail = np.array([total & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) ^ (np.array([flat.size], dtype=np.uint64) * _STEP)
    return int(_mix(tail)[0])


def _view(address: int, nbytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(address))


def gather(addresses: np.ndarray, nbytes: int, to: np.ndarray) -> int:
    """Copies the pieces at `addresses` (uint64, `nbytes` each) into `to` one after another; returns the digest of `to`."""
    for k, address in enumerate(addresses.tolist()):
        np.copyto(to[k * nbytes : (k + 1) * nbytes], _view(address, nbytes))
    return digest(to[: len(addresses) * nbytes])


def scatter(source: np.ndarray, addresses: np.ndarray, nbytes: int) -> int:
    """The way back; an address of 0 is not written. Returns the digest of all of `source`."""
    for k, address in enumerate(addresses.tolist()):
        if address:
            np.copyto(_view(address, nbytes), source[k * nbytes : (k + 1) * nbytes])
    return digest(source[: len(addresses) * nbytes])


def gather_rounded(addresses: np.ndarray, rows: int, values: int, payload: str, dtype: str, to: np.ndarray) -> int:
    """gather() with a rounded payload: pieces of `rows` rows of `values` values."""
    nbytes = rows * rounded.row_bytes(values)
    for k, address in enumerate(addresses.tolist()):
        raw = _view(address, rows * values * rounded.value_bytes(dtype)).reshape(rows, -1)
        to[k * nbytes : (k + 1) * nbytes] = rounded.shrink(raw, payload, dtype).reshape(-1)
    return digest(to[: len(addresses) * nbytes])


def scatter_rounded(source: np.ndarray, addresses: np.ndarray, rows: int, values: int, payload: str, dtype: str) -> int:
    """The way back; an address of 0 is not written. Returns the digest of all of `source`."""
    nbytes = rows * rounded.row_bytes(values)
    for k, address in enumerate(addresses.tolist()):
        if address:
            raw = rounded.grow(source[k * nbytes : (k + 1) * nbytes].reshape(rows, -1), payload, dtype)
            np.copyto(_view(address, raw.size), raw.reshape(-1))
    return digest(source[: len(addresses) * nbytes])

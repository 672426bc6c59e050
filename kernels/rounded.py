"""The rounded payloads in plain numpy: sizes for everybody, and the path where no compiler is. They are defined in csrc/rounded.h."""

from __future__ import annotations

import numpy as np

FP8, INT8 = "fp8", "int8"
PAYLOADS = (FP8, INT8)
#: the formats of a cache that can be stored in fewer bits, with the compiled code's numbers for them
FORMATS = {"bfloat16": 1, "float16": 2, "float32": 3}
NAN = {"bfloat16": 0x7FC0, "float16": 0x7E00, "float32": 0x7FC00000}
MAX_VALUES = 4096
_SCALE_MIN = 10


def code(payload: str, dtype: str) -> int:
    """The compiled code's number for it."""
    return (FORMATS[dtype] + 4 * PAYLOADS.index(payload)) if payload else 0


def value_bytes(dtype: str) -> int:
    """Of one value in the cache."""
    return 4 if dtype == "float32" else 2


def row_bytes(values: int) -> int:
    """Of one stored row."""
    return 8 + values


def groups(values: int) -> int:
    """How many scales a row of so many values has. Raises ValueError where it cannot be stored so."""
    if values % 8 or not 0 < values <= MAX_VALUES:
        raise ValueError(f"a row of {values} values is not a multiple of 8 up to {MAX_VALUES}")
    count = 8
    while values % (8 * count):
        count //= 2
    return count


def shrink(raw: np.ndarray, payload: str, dtype: str) -> np.ndarray:
    """Rows of bytes (uint8 [rows, bytes]) in the cache's format -> stored rows (uint8 [rows, row_bytes])."""
    x = _floats(raw, dtype)
    rows, values = x.shape
    grouped = x.reshape(rows, groups(values), -1)
    bits = grouped.view(np.uint32) & np.uint32(0x7FFFFFFF)
    largest = np.where(bits < 0x7F800000, bits, 0).max(axis=2)
    carry, shift = (0x1FFFFF, 8) if payload == FP8 else (0x1FFFF, 6)
    scale = np.maximum(((largest + np.uint32(carry)) >> np.uint32(23)).astype(np.int64) - shift, _SCALE_MIN)
    down = ((254 - scale).astype(np.uint32) << np.uint32(23)).view(np.float32)
    out = np.zeros((rows, row_bytes(values)), np.uint8)
    out[:, : scale.shape[1]] = scale
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        scaled = grouped * down[:, :, None]
        out[:, 8:] = (_encode_fp8(scaled) if payload == FP8 else _encode_int8(scaled)).reshape(rows, values)
    return out


def grow(stored: np.ndarray, payload: str, dtype: str) -> np.ndarray:
    """Stored rows (uint8 [rows, row_bytes]) -> rows of bytes in the cache's format."""
    rows, values = stored.shape[0], stored.shape[1] - 8
    codes, count = stored[:, 8:], groups(values)
    up = (stored[:, :count].astype(np.uint32) << np.uint32(23)).view(np.float32)
    x = _decode_fp8(codes) if payload == FP8 else np.ascontiguousarray(codes).view(np.int8).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # next to the largest float32, which no cache holds
        x = (x.reshape(rows, count, -1) * up[:, :, None]).reshape(rows, values)
        if dtype == "float32":
            out = x.view(np.uint32)
        elif dtype == "float16":
            out = np.clip(x, -65504, 65504).astype(np.float16).view(np.uint16)
        else:
            out = (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    out[(codes & 0x7F) == 0x7F if payload == FP8 else codes == 0x80] = NAN[dtype]
    return out.view(np.uint8)


def _floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    raw = np.ascontiguousarray(raw)
    if dtype == "float32":
        return raw.view(np.float32)
    if dtype == "float16":
        return raw.view(np.float16).astype(np.float32)
    return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _encode_int8(x: np.ndarray) -> np.ndarray:
    whole = np.clip(np.rint(x), -127, 127)
    return np.where(np.isfinite(x), whole, -128).astype(np.int8).view(np.uint8)


def _encode_fp8(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    a = bits & np.uint32(0x7FFFFFFF)
    normal = ((a + np.uint32(0x7FFFF) + ((a >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)) - np.uint32(960)
    is_small = a < 0x3C800000
    small = (np.where(is_small, a, 0).view(np.float32) + np.float32(16384)).view(np.uint32) - np.uint32(0x46800000)
    code = np.where(is_small, small, np.minimum(normal, 0x7E)) | ((bits >> np.uint32(24)) & np.uint32(0x80))
    return np.where(a >= 0x7F800000, 0x7F, code).astype(np.uint8)


def _decode_fp8(codes: np.ndarray) -> np.ndarray:
    c = codes.astype(np.uint32)
    a = c & np.uint32(0x7F)
    normal = (a << np.uint32(20)) + np.uint32(120 << 23)
    small = ((a & np.uint32(7)).astype(np.float32) * np.float32(2**-9)).view(np.uint32)
    bits = np.where(a < 8, small, normal) | ((c & np.uint32(0x80)) << np.uint32(24))
    return bits.astype(np.uint32).view(np.float32)

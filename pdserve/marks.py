"""Marks: what tells two prompts apart without their tokens. Pure.

A mark is made of all tokens up to a place, so two prompts have equal marks as far as they are equal, and unequal ones
from the first different token on (one in 65536 is equal by chance). The seed is the cache daemon's own and new at each
start: marks mean nothing outside of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from blake3 import blake3

from pdserve.chunk import MediaSpan

_STEP = np.uint64(0x9E3779B97F4A7C15)


def seed(daemon_id: str) -> int:
    return int.from_bytes(blake3(b"pdserve marks\0" + daemon_id.encode()).digest(length=8), "little")


def make(
    tokens: Sequence[int], chunk_tokens: int, seed: int, media: Iterable[MediaSpan] = (), most: int = 1 << 16
) -> tuple[bytes, bytes]:
    """(2 bytes for each token, 8 bytes for the end of each full chunk), of the first `most` tokens."""
    ids = np.asarray(tokens[:most], dtype=np.uint64)
    places = np.arange(1, len(ids) + 1, dtype=np.uint64) * _STEP + np.uint64(seed)
    parts = _mixed(_mixed(ids + np.uint64(1)) ^ places)
    for identifier, first, _ in media:  # tokens of an image say nothing of the image
        if first < len(parts):
            parts[first] ^= np.uint64(int.from_bytes(blake3(identifier.encode()).digest(length=8), "little"))
    states = _mixed(np.cumsum(parts, dtype=np.uint64))
    marks = (states >> np.uint64(48)).astype("<u2").tobytes()
    return marks, states[chunk_tokens - 1 :: chunk_tokens].astype("<u8").tobytes()


def common(one: bytes, other: bytes) -> int:
    """How many tokens from the start two prompts have in common, by their marks."""
    length = min(len(one), len(other)) // 2
    a, b = np.frombuffer(one, "<u2", length), np.frombuffer(other, "<u2", length)
    different = np.flatnonzero(a != b)
    return int(different[0]) if len(different) else length


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's last steps, which make every bit depend on every other."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed

"""Chunks for tests of the disk tier, and looking at every byte of them."""

import contextlib
import os
import time

import numpy as np

from pdserve import kernels
from pdserve.chunk import FORMAT_VERSION
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.tiers import segments
from pdserve.transfer.tiers.base import ChunkRecord, CorruptChunk
from pdserve.transfer.tiers.disk import DiskTier

SEGMENT = 64 * PAGE


def fail(number):
    raise OSError(number, os.strerror(number))


def chunk(i, pages=3, shards=2):
    rng = np.random.default_rng(i)
    payload = []
    for _ in range(shards):
        part = segments.aligned(pages * PAGE)
        part[:] = rng.integers(0, 256, part.size, dtype=np.uint8)
        payload.append(part)
    return ChunkRecord(
        FORMAT_VERSION, i.to_bytes(32, "little"), b"", 256, pages * PAGE, [kernels.digest(p) for p in payload], b"t"
    ), payload


def open_tier(folder, size=16 * SEGMENT, **options):
    return DiskTier(folder, size, **{"min_free": 0, "segment_bytes": SEGMENT, **options})


def soon():
    return time.monotonic() + 30


def fill(tier, ids, **shape):
    for i in ids:
        record, payload = chunk(i, **shape)
        assert tier.put(record, payload, soon())


def whole(tier, i, **shape):
    """True: there and right. False: not there. Anything else is an error."""
    record, payload = chunk(i, **shape)
    (known,) = tier.contains([record.key])
    if known is None:
        return False
    assert known == record
    into = [segments.aligned(record.shard_bytes) for _ in record.digests]
    try:
        if not tier.get(record, into, soon()):
            return False
    except CorruptChunk:
        return False
    if [kernels.digest(p) for p in into] != record.digests:
        tier.quarantine(record.key)
        return False
    assert all(np.array_equal(a, b) for a, b in zip(into, payload, strict=True))
    return True


def present(tier, ids):
    return [i for i in ids if whole(tier, i)]


def on_disk(folder):
    total = 0
    for f in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # an index that has just taken its place
            total += f.stat().st_size
    return total

"""A tier under test, and chunks to try it with."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from pdserve import kernels
from pdserve.chunk import FORMAT_VERSION, KEY_BYTES
from pdserve.transfer.tiers.base import ChunkRecord, Tier, TierError

#: longer than any answer of a backend that is well, on a busy machine
PATIENCE_S = 30.0


class Subject:
    """A tier under test and what can be done to its backend. Subclass it; all but `stalled` must be there."""

    #: bytes of a shard: the first is the one used where only one is needed
    shard_sizes = (65536, 1, 4096, 70001, 1 << 20)
    #: how many keys to ask for at once
    many_keys = 300
    #: what deleting or losing a chunk may take to show (a store may hold a lease on what was just read)
    settles_s = 0.0
    #: tiers whose library starts threads or files that it never ends
    leaves_threads = False

    def open(self) -> Tier:
        """A tier over the same backend each time."""
        raise NotImplementedError

    def break_put(self, tier: Tier, record: ChunkRecord, payload: list[np.ndarray]) -> None:
        """Puts, and sees to it that the writer is cut off after some bytes of the payload have gone."""
        raise NotImplementedError

    def flip(self, record: ChunkRecord, position: int) -> None:
        """Changes one byte of the stored payload behind the tier's back."""
        raise NotImplementedError

    def stalled(self, tier: Tier) -> object | None:
        """A context manager in which the backend does not answer; None where that cannot be arranged."""
        return None


# ---- chunks to work with ----


def make_chunk(shard_bytes: int, shards: int = 1) -> tuple[ChunkRecord, list[np.ndarray]]:
    """Fresh random bytes and the record that goes with them."""
    payload = [np.frombuffer(secrets.token_bytes(shard_bytes), np.uint8).copy() for _ in range(shards)]
    return record_of(secrets.token_bytes(KEY_BYTES), payload), payload


def record_of(key: bytes, payload: list[np.ndarray]) -> ChunkRecord:
    digests = [kernels.digest(part) for part in payload]
    parent, tag = secrets.token_bytes(KEY_BYTES), secrets.token_bytes(16)
    return ChunkRecord(FORMAT_VERSION, key, parent, 256, payload[0].nbytes, digests, tag)


def space_for(record: ChunkRecord) -> list[np.ndarray]:
    """Where a chunk is read to: slices of one larger array, as they are in the arena, filled with something else."""
    stride = record.shard_bytes + 64
    whole = np.full(stride * len(record.digests), 0xA5, np.uint8)
    return [whole[i * stride : i * stride + record.shard_bytes] for i in range(len(record.digests))]


def soon() -> float:
    return time.monotonic() + PATIENCE_S


def read(tier: Tier, record: ChunkRecord) -> list[np.ndarray] | None:
    """The chunk's shards; None when the tier says that it is gone."""
    into = space_for(record)
    return into if tier.get(record, into, soon()) else None


def is_whole(record: ChunkRecord, shards: list[np.ndarray]) -> bool:
    return [kernels.digest(part) for part in shards] == record.digests


@contextmanager
def opened(subject: Subject) -> Iterator[Tier]:
    tier = subject.open()
    try:
        yield tier
    finally:
        tier.close()


def eventually(what: Callable[[], bool], patience: float) -> bool:
    ends = time.monotonic() + patience
    while not what():
        if time.monotonic() > ends:
            return False
        time.sleep(0.02)
    return True


def works(tier: Tier, patience: float = PATIENCE_S) -> bool:
    record, payload = make_chunk(1000)
    try:
        return tier.put(record, payload, time.monotonic() + patience) and read(tier, record) is not None
    except TierError:
        return False

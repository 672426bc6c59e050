"""A chunk that is in the arena, being written or committed, and what clients hold of it: reservations and leases."""

from __future__ import annotations

import msgspec

from pdserve.chunk import FORMAT_VERSION
from pdserve.transfer.allocator import align
from pdserve.transfer.tiers.base import ChunkRecord
from pdserve.transfer.wire import ReserveItem


class Chunk(msgspec.Struct, gc=False, eq=False):
    """One chunk in the arena, being written (`digests` has gaps) or committed. Never part of a cycle: the garbage collector
    need not look at it."""

    key: bytes
    parent: bytes
    tokens: int
    tag: bytes
    shard_bytes: int
    stride: int
    digests: list[int | None]
    writer: str
    offset: int
    created: float
    open: tuple[int, ...] = ()  # reservations whose client may still write
    leases: int = 0  # clients' leases and our own holds
    internal: bool = False  # the daemon itself brings it in, no client may join
    source: str = "dram"  # the tier it came from, until a client has loaded it from here
    below: int = 0  # lower tiers that have it, or have been asked to take it: Lower.bit of each
    uses: int = 0  # loads since it is here
    committed: bool = False
    dead: bool = False  # not in the index any more; the space goes with the last holder

    @staticmethod
    def begin(item: ReserveItem, writer: str, offset: int, now: float) -> Chunk:
        digests: list[int | None] = [None] * item.shards
        stride = align(item.shard_bytes)
        return Chunk(
            item.key, item.parent, item.tokens, item.tag, item.shard_bytes, stride, digests, writer, offset, now
        )

    def close(self, reservation: int) -> None:
        """It is written, or given up."""
        self.open = () if self.open == (reservation,) else tuple(r for r in self.open if r != reservation)

    @property
    def size(self) -> int:
        return self.stride * len(self.digests)

    @property
    def payload_bytes(self) -> int:
        return self.shard_bytes * len(self.digests)

    def record(self) -> ChunkRecord:
        """What is kept beside the bytes in any other tier. Only of a committed chunk."""
        digests = [d for d in self.digests if d is not None]
        assert len(digests) == len(self.digests)
        return ChunkRecord(FORMAT_VERSION, self.key, self.parent, self.tokens, self.shard_bytes, digests, self.tag)


class Reservation:
    __slots__ = ("chunk", "client", "count", "shard")

    def __init__(self, chunk: Chunk, shard: int, count: int, client: int) -> None:
        self.chunk, self.shard, self.count, self.client = chunk, shard, count, client


class Lease:
    __slots__ = ("chunks", "client", "ends")

    def __init__(self, chunks: list[Chunk], client: int, ends: float) -> None:
        self.chunks, self.client, self.ends = chunks, client, ends

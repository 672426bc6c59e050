"""A chunk that is in the arena, being written or committed, and what clients hold of it: reservations and leases."""

from __future__ import annotations

from pdserve.chunk import FORMAT_VERSION
from pdserve.transfer.allocator import align
from pdserve.transfer.tiers.base import ChunkRecord
from pdserve.transfer.wire import ReserveItem


class Chunk:
    """One chunk in the arena, being written (`digests` has gaps) or committed."""

    __slots__ = (
        "below",
        "committed",
        "created",
        "dead",
        "digests",
        "internal",
        "key",
        "leases",
        "offset",
        "open",
        "parent",
        "shard_bytes",
        "source",
        "stride",
        "tag",
        "tokens",
        "uses",
        "writer",
    )

    def __init__(self, item: ReserveItem, writer: str, offset: int, now: float) -> None:
        self.key, self.parent, self.tokens = item.key, item.parent, item.tokens
        self.shard_bytes, self.stride = item.shard_bytes, align(item.shard_bytes)
        self.digests: list[int | None] = [None] * item.shards
        self.writer, self.offset, self.created = writer, offset, now
        self.open: set[int] = set()  # reservations whose client may still write
        self.leases = 0  # clients' leases and our own holds
        self.tag = item.tag
        self.internal = False  # the daemon itself brings it in, no client may join
        self.source = "dram"  # the tier it came from, until a client has loaded it from here
        self.below: set[str] = set()  # lower tiers that have it, or have been asked to take it
        self.uses = 0  # loads since it is here
        self.committed = False
        self.dead = False  # not in the index any more; the space goes with the last holder

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

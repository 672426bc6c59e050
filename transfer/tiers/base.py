"""What a place for chunks below DRAM must offer. The DRAM tier itself is the arena with its index (store.py).

A tier is called from threads of its own (tiering.py), never from the daemon's loop, and never holds up an engine: reads
have a deadline after which they count as a miss, writes are queued and dropped under pressure.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np

from pdserve.errors import CacheError


class TierError(CacheError):
    """The tier could not do it: disk full, server gone, deadline passed. Counted, logged, treated as a miss; the circuit
    breaker (breaker.py) listens to these."""


class CorruptChunk(TierError):
    """What came back is not what was stored. The tier has quarantined it before it raises this."""


class ChunkRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """All that must be kept beside a chunk's bytes to use it again, on this machine or another."""

    format: int
    key: bytes
    parent: bytes
    tokens: int
    #: bytes of one shard; the payload is the shards one after another, without the arena's page padding
    shard_bytes: int
    digests: list[int]
    #: whose it is, opaque (see wire.ReserveItem)
    tag: bytes = b""

    @property
    def payload_bytes(self) -> int:
        return self.shard_bytes * len(self.digests)


ToStore = tuple[ChunkRecord, list[np.ndarray]]  # as put() takes it


class Tier(Protocol):
    """One place for chunks. Methods may be called from several threads at once."""

    #: "disk", "redis", "s3", "mooncake", "fs": the label in metrics and log lines
    name: str

    def contains(self, keys: list[bytes]) -> list[ChunkRecord | None]:
        """What is known of each key; a hit here may still turn out to be a miss in get(). Raises TierError."""

    def get(self, record: ChunkRecord, into: list[np.ndarray], deadline: float) -> bool:
        """Reads the payload into `into` (one uint8 array of shard_bytes per shard, in the arena). False: gone meanwhile.

        The caller verifies the digests (it does so for every tier alike). `deadline` is time.monotonic(); raises TierError
        when it passes. After return or raise, nothing writes into `into` any more.
        """

    def put(self, record: ChunkRecord, payload: list[np.ndarray], deadline: float) -> bool:
        """Stores the shards. True: they will be found, whole, by contains() from now on. False: refused (cap, policy).

        Never leaves a half-written chunk visible, whatever happens. After return or raise, `payload` is not read any more.
        """

    def delete(self, keys: list[bytes]) -> int:
        """Forgets the keys; returns how many were there."""

    def stats(self) -> dict[str, int | float | str]:
        """At least: chunks, used_bytes, capacity_bytes (0 where unknown), state ("ok", or what is wrong)."""

    # A tier that stores several chunks sooner together than one by one also has
    #     def put_many(self, chunks: list[ToStore], deadline: float) -> list[bool]
    # with an answer for each as put() would give it. An error is that of all of them.
    #
    # A tier that can list what it holds also has
    #     def listing(self, deadline: float) -> Iterator[ChunkRecord]
    # every chunk, whoever stored it, a few at a time; raises TierError when `deadline` passes. It is for deleting by tenant or
    # by prefix, may take minutes, and is asked on a thread of the tier's.

    def close(self) -> None:
        """Ends its threads and connections, within seconds."""

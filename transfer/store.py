"""What is in the arena and who holds it: chunks, reservations, leases. Pure: no sockets, no shared memory, time is handed in.

The life of a chunk:  reserve -> (bytes are written by the client) -> commit of every shard -> visible -> evicted or dropped.
Nothing is found before its last shard is committed. Space is handed to somebody else only when nobody who may still
write into it, or read it under a lease, is left:
  * a reservation that outlives its time leaves the index at once, but keeps its space until its client commits, aborts or is gone;
  * a chunk that is dropped while leased leaves the index at once, and its space with the last lease.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pdserve.transfer.allocator import Allocator, align
from pdserve.transfer.eviction import EvictionPolicy
from pdserve.transfer.wire import BUSY, EXISTS, FULL, GRANTED, TOO_LARGE, CommitItem, Found, Grant, ReserveItem

LEASE_S = 30.0
RESERVATION_S = 60.0


class Chunk:
    """One chunk in the arena, being written (`digests` has gaps) or committed."""

    __slots__ = (
        "committed",
        "created",
        "dead",
        "digests",
        "key",
        "leases",
        "offset",
        "open",
        "parent",
        "shard_bytes",
        "stride",
        "tokens",
        "writer",
    )

    def __init__(self, item: ReserveItem, writer: str, offset: int, now: float) -> None:
        self.key, self.parent, self.tokens = item.key, item.parent, item.tokens
        self.shard_bytes, self.stride = item.shard_bytes, align(item.shard_bytes)
        self.digests: list[int | None] = [None] * item.shards
        self.writer, self.offset, self.created = writer, offset, now
        self.open: set[int] = set()  # reservations whose client may still write
        self.leases = 0
        self.committed = False
        self.dead = False  # not in the index any more; the space goes with the last holder

    @property
    def size(self) -> int:
        return self.stride * len(self.digests)

    @property
    def payload_bytes(self) -> int:
        return self.shard_bytes * len(self.digests)


class _Reservation:
    __slots__ = ("chunk", "client", "shard")

    def __init__(self, chunk: Chunk, shard: int, client: int) -> None:
        self.chunk, self.shard, self.client = chunk, shard, client


class _Lease:
    __slots__ = ("chunks", "client", "ends")

    def __init__(self, chunks: list[Chunk], client: int, ends: float) -> None:
        self.chunks, self.client, self.ends = chunks, client, ends


class Store:
    """The DRAM tier's index. `metrics` are those of pdserve.metrics.CACHE. Not thread-safe: the daemon's loop owns it."""

    def __init__(self, capacity: int, policy: EvictionPolicy, metrics: dict[str, Any]) -> None:
        self.allocator = Allocator(capacity)
        self._policy = policy
        self._m = metrics
        self._index: dict[bytes, Chunk] = {}
        self._reservations: dict[int, _Reservation] = {}
        self._leases: dict[int, _Lease] = {}
        self._next_id = 1
        self._largest = 0
        for name in ("cache_capacity_bytes", "cache_used_bytes", "cache_chunks"):
            self._m[name].labels("dram")
        self._m["cache_capacity_bytes"].labels("dram").set(self.allocator.capacity)

    # ---- reading ----

    def lookup(self, keys: list[bytes], client: int, now: float) -> tuple[int, list[Found], int]:
        """(lease, the committed run from keys[0] on, how many keys after it are being written now)."""
        chunks: list[Chunk] = []
        for key in keys:
            chunk = self._index.get(key)
            if chunk is None or not chunk.committed:
                break
            chunks.append(chunk)
        pending = 0
        for key in keys[len(chunks) :]:
            chunk = self._index.get(key)
            if chunk is None or chunk.committed:
                break
            pending += 1
        self._m["cache_lookups_total"].inc()
        self._m["cache_lookup_chunks_total"].labels("hit").inc(len(chunks))
        self._m["cache_lookup_chunks_total"].labels("miss").inc(len(keys) - len(chunks))
        if not chunks:
            return 0, [], pending
        for chunk in reversed(chunks):  # the root last: a parent is never older than its children
            self._policy.touch(chunk.key)
            self._policy.pin(chunk.key)
            chunk.leases += 1
        lease = self._new_id()
        self._leases[lease] = _Lease(chunks, client, now + LEASE_S)
        found = [
            Found(c.offset, c.tokens, c.shard_bytes, c.stride, [d for d in c.digests if d is not None]) for c in chunks
        ]
        return lease, found, pending

    def release(self, lease: int, client: int) -> bool:
        """Ends a lease; False when it is not this client's or has ended already."""
        held = self._leases.get(lease)
        if held is None or held.client != client:
            return False
        self._end_lease(lease)
        return True

    def drop(self, keys: list[bytes], reason: str) -> int:
        """Takes committed chunks out of the cache now; returns how many were there."""
        count = 0
        for key in keys:
            chunk = self._index.get(key)
            if chunk is not None and chunk.committed:
                self._forget(chunk)
                count += 1
        if count:
            self._m["cache_evictions_total"].labels("dram", reason).inc(count)
        return count

    def clear(self) -> int:
        """Drops everything that is visible."""
        return self.drop([k for k, c in self._index.items() if c.committed], "cleared")

    # ---- writing ----

    def reserve(self, items: list[ReserveItem], writer: str, client: int, now: float) -> list[Grant]:
        """Space for each item, evicting where needed; see wire.Grant for what an answer means."""
        return [self._reserve_one(item, writer, client, now) for item in items]

    def commit(self, items: list[CommitItem], client: int) -> int:
        """Shards are written. Returns how many counted: a reservation that was taken back does not."""
        counted = 0
        for item in items:
            held = self._reservations.get(item.reservation)
            if held is None or held.client != client:
                continue
            del self._reservations[item.reservation]
            chunk = held.chunk
            chunk.open.discard(item.reservation)
            if chunk.dead:
                self._free_if_unheld(chunk)
                continue
            chunk.digests[held.shard] = item.digest
            counted += 1
            if all(d is not None for d in chunk.digests):
                chunk.committed = True
                self._policy.add(chunk.key, chunk.parent)
                self._m["cache_stored_chunks_total"].inc()
                self._m["cache_stored_bytes_total"].inc(chunk.payload_bytes)
        return counted

    def abort(self, reservations: list[int], client: int) -> int:
        """The client gives up writing these. The whole chunk goes: without this shard it can never be complete."""
        count = 0
        for rid in reservations:
            held = self._reservations.get(rid)
            if held is None or held.client != client:
                continue
            del self._reservations[rid]
            held.chunk.open.discard(rid)
            self._forget(held.chunk)
            count += 1
        return count

    # ---- time and clients ----

    def client_gone(self, client: int) -> None:
        """A client's connection ended: nobody writes or reads for it any more."""
        lost = [rid for rid, r in self._reservations.items() if r.client == client]
        self.abort(lost, client)
        ended = [lid for lid, lease in self._leases.items() if lease.client == client]
        for lid in ended:
            self._end_lease(lid)
        if lost:
            self._m["cache_expired_total"].labels("reservation", "client_gone").inc(len(lost))
        if ended:
            self._m["cache_expired_total"].labels("lease", "client_gone").inc(len(ended))

    def expire(self, now: float) -> None:
        """Takes back what outlived its time. Call it about once a second."""
        late = [c for c in self._index.values() if not c.committed and now - c.created > RESERVATION_S]
        for chunk in late:
            self._forget(chunk)
            self._m["cache_expired_total"].labels("reservation", "timeout").inc()
        for lid in [lid for lid, lease in self._leases.items() if lease.ends < now]:
            self._end_lease(lid)
            self._m["cache_expired_total"].labels("lease", "timeout").inc()

    # ---- looking ----

    def stats(self) -> dict[str, int]:
        return {
            "chunks": sum(c.committed for c in self._index.values()),
            "used_bytes": self.allocator.used,
            "capacity_bytes": self.allocator.capacity,
            "leases": len(self._leases),
            "reservations": len(self._reservations),
        }

    def chunks(self) -> Iterator[Chunk]:
        """The visible chunks."""
        return (c for c in self._index.values() if c.committed)

    # ---- inside ----

    def _reserve_one(self, item: ReserveItem, writer: str, client: int, now: float) -> Grant:
        chunk = self._index.get(item.key)
        if chunk is not None and chunk.committed:
            self._policy.touch(chunk.key)
            self._m["cache_reserve_failures_total"].labels("exists").inc()
            return Grant(EXISTS)
        if chunk is None:
            size = align(item.shard_bytes) * item.shards
            if size > self.allocator.capacity:
                self._m["cache_reserve_failures_total"].labels("too_large").inc()
                return Grant(TOO_LARGE)
            offset = self._make_room(size, item.parent)
            if offset is None:
                self._m["cache_reserve_failures_total"].labels("full").inc()
                return Grant(FULL)
            chunk = self._index[item.key] = Chunk(item, writer, offset, now)
        elif not self._may_join(chunk, item, writer):
            self._m["cache_reserve_failures_total"].labels("exists").inc()
            return Grant(BUSY)
        rid = self._new_id()
        self._reservations[rid] = _Reservation(chunk, item.shard, client)
        chunk.open.add(rid)
        return Grant(GRANTED, rid, chunk.offset + item.shard * chunk.stride)

    def _may_join(self, chunk: Chunk, item: ReserveItem, writer: str) -> bool:
        """Another worker of the same engine brings its own shard of a chunk that is being written."""
        if chunk.writer != writer or len(chunk.digests) != item.shards or chunk.shard_bytes != item.shard_bytes:
            return False
        taken = any(self._reservations[r].shard == item.shard for r in chunk.open)
        return item.shard < item.shards and chunk.digests[item.shard] is None and not taken

    def _make_room(self, size: int, parent: bytes) -> int | None:
        self._largest = max(self._largest, size)
        high = size * 2 <= self._largest  # tails and other small chunks live at the far end
        while (offset := self.allocator.allocate(size, high=high)) is None:
            victim = self._policy.victim()
            # A prompt larger than the cache: evicting the parent would leave its child unreachable.
            if victim is None or victim == parent:
                return None
            self._forget(self._index[victim])
            self._m["cache_evictions_total"].labels("dram", "capacity").inc()
        return offset

    def _forget(self, chunk: Chunk) -> None:
        """Out of the index now; the space when nobody holds it."""
        if chunk.dead:
            self._free_if_unheld(chunk)
            return
        chunk.dead = True
        del self._index[chunk.key]
        if chunk.committed:
            self._policy.remove(chunk.key)
        self._free_if_unheld(chunk)

    def _free_if_unheld(self, chunk: Chunk) -> None:
        if chunk.dead and not chunk.open and not chunk.leases and chunk.offset >= 0:
            self.allocator.free(chunk.offset)
            chunk.offset = -1

    def _end_lease(self, lease: int) -> None:
        for chunk in self._leases.pop(lease).chunks:
            chunk.leases -= 1
            if chunk.dead:
                self._free_if_unheld(chunk)
            else:
                self._policy.unpin(chunk.key)

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

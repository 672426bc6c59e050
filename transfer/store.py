"""What is in the arena and who holds it: chunks, reservations, leases. Pure: no sockets, no shared memory, time is handed in.

Besides clients, the daemon itself brings chunks in (begin, then publish or discard) and keeps chunks from going while a
lower tier reads them (hold, unhold).

The life of a chunk:  reserve -> (bytes are written by the client) -> commit of every shard -> visible -> evicted or dropped.
Nothing is found before its last shard is committed. Space is handed to somebody else only when nobody who may still
write into it, or read it under a lease, is left:
  * a reservation that outlives its time leaves the index at once, but keeps its space until its client commits, aborts or is gone;
  * a chunk that is dropped while leased leaves the index at once, and its space with the last lease.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pdserve.transfer.allocator import Allocator, align
from pdserve.transfer.eviction import EvictionPolicy
from pdserve.transfer.resident import Chunk, Lease, Reservation
from pdserve.transfer.tiers.base import ChunkRecord
from pdserve.transfer.wire import BUSY, EXISTS, FULL, GRANTED, TOO_LARGE, CommitItem, Found, Grant, ReserveItem

LEASE_S = 30.0
RESERVATION_S = 60.0
#: stands among a chunk's open reservations for the daemon's own writing
_OURS = 0


class Store:
    """The DRAM tier's index. `metrics` are those of pdserve.metrics.cache. Not thread-safe: the daemon's loop owns it."""

    def __init__(self, capacity: int, policy: EvictionPolicy, metrics: dict[str, Any]) -> None:
        self.allocator = Allocator(capacity)
        self._policy = policy
        self._m = metrics
        self.written = 0  # bytes of shards that clients have committed
        self._index: dict[bytes, Chunk] = {}
        #: those of them that are not visible yet: what may expire is looked for here, not among all
        self._unfinished: dict[bytes, Chunk] = {}
        self._reservations: dict[int, Reservation] = {}
        self._leases: dict[int, Lease] = {}
        self._next_id = 1
        self._largest = 0
        self._chunks = 0
        #: chunks that were taken away on purpose, so far
        self.dropped = 0
        #: told when a chunk becomes visible, and when one that was visible is gone
        self.on_committed: list[Callable[[Chunk], None]] = []
        self.on_forgotten: list[Callable[[Chunk], None]] = []
        #: why: of a chunk that on_forgotten is told of
        self.removing = "capacity"
        self._evicted = 0  # not counted in the metric yet
        self._evictions = metrics["cache_evictions_total"].labels("dram", "capacity")
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
            if chunk is None or chunk.committed or chunk.internal:
                break
            pending += 1
        if not chunks:
            return 0, [], pending
        for chunk in reversed(chunks):  # the root last: a parent is never older than its children
            self._policy.touch(chunk.key)
            self._policy.pin(chunk.key)
            chunk.leases += 1
        lease = self._new_id()
        self._leases[lease] = Lease(chunks, client, now + LEASE_S)
        found = [
            Found(c.offset, c.tokens, c.shard_bytes, c.stride, [d for d in c.digests if d is not None], c.source)
            for c in chunks
        ]
        return lease, found, pending

    def release(self, lease: int, client: int) -> bool:
        """Ends a lease; False when it is not this client's or has ended already."""
        held = self._leases.get(lease)
        if held is None or held.client != client:
            return False
        self._end_lease(lease)
        return True

    def loaded(self, lease: int, client: int, count: int) -> list[Chunk]:
        """The first `count` chunks of the lease were read by its client. Returns them, their `source` still as it was."""
        held = self._leases.get(lease)
        if held is None or held.client != client:
            return []
        for chunk in held.chunks[:count]:
            chunk.uses += 1
        return held.chunks[:count]

    def peek(self, key: bytes) -> Chunk | None:
        """The chunk as it is, committed or not; no use is counted."""
        return self._index.get(key)

    def hold(self, chunk: Chunk) -> None:
        """Keeps a committed chunk and its space until unhold()."""
        self._policy.pin(chunk.key)
        chunk.leases += 1

    def unhold(self, chunk: Chunk) -> None:
        chunk.leases -= 1
        if chunk.dead:
            self._free_if_unheld(chunk)
        else:
            self._policy.unpin(chunk.key)

    def victim(self) -> Chunk | None:
        """What would be evicted next."""
        key = self._policy.victim()
        return None if key is None else self._index[key]

    def drop(self, keys: list[bytes], reason: str) -> int:
        """Takes committed chunks out of the cache now; returns how many were there. What the daemon is bringing in goes, too,
        and is told of: an earlier daemon's journal may have it, and it would be back with the next start."""
        count = 0
        self.removing = reason
        for key in keys:
            chunk = self._index.get(key)
            if chunk is None:
                continue
            if chunk.committed:
                self._forget(chunk)
                count += 1
            elif chunk.internal:
                for tell in self.on_forgotten:
                    tell(chunk)
                self._forget(chunk)
        self.removing = "capacity"
        self.dropped += count
        if count:
            self._m["cache_evictions_total"].labels("dram", reason).inc(count)
        return count

    def clear(self) -> int:
        """Drops everything that is visible or on its way."""
        return self.drop([k for k, c in self._index.items() if c.committed or c.internal], "cleared")

    # ---- writing ----

    def reserve(self, items: list[ReserveItem], writer: str, client: int, now: float) -> list[Grant]:
        """Space for each item, evicting where needed; see wire.Grant for what an answer means."""
        grants = [self._reserve_one(item, writer, client, now) for item in items]
        self._count_evictions()
        return grants

    def commit(self, items: list[CommitItem], client: int) -> int:
        """Shards are written. Returns how many counted: a reservation that was taken back does not."""
        counted, whole = 0, list[Chunk]()
        for item in items:
            held = self._reservations.get(item.reservation)
            if held is None or held.client != client or held.count != 1 + len(item.more):
                continue
            del self._reservations[item.reservation]
            chunk = held.chunk
            chunk.close(item.reservation)
            if chunk.dead:
                self._free_if_unheld(chunk)
                continue
            chunk.digests[held.shard : held.shard + held.count] = [item.digest, *item.more]
            counted += 1
            self.written += chunk.shard_bytes * held.count
            if all(d is not None for d in chunk.digests):
                whole.append(chunk)
                self._commit(chunk)
        if whole:  # a counter's own cost is a good part of a chunk's
            self._m["cache_stored_chunks_total"].inc(len(whole))
            self._m["cache_stored_bytes_total"].inc(sum(chunk.payload_bytes for chunk in whole))
            self._m["cache_stored_tokens_total"].inc(sum(chunk.tokens for chunk in whole))
        return counted

    def abort(self, reservations: list[int], client: int) -> int:
        """The client gives up writing these. The whole chunk goes: without this shard it can never be complete."""
        count = 0
        for rid in reservations:
            held = self._reservations.get(rid)
            if held is None or held.client != client:
                continue
            del self._reservations[rid]
            held.chunk.close(rid)
            self._forget(held.chunk)
            count += 1
        return count

    def begin(self, record: ChunkRecord, source: str, now: float, offset: int | None = None) -> Chunk | None:
        """Space for a chunk that the daemon brings in from `source`, evicting where needed; at `offset` if given. None: no
        room, or the key is there already. End with publish() or discard(). `now` may be infinite: it never expires."""
        size = align(record.shard_bytes) * len(record.digests)
        if record.key in self._index or size > self.allocator.capacity:
            return None
        if offset is None:
            offset = self._make_room(size, record.parent)
            self._count_evictions()
        elif not self.allocator.claim(offset, size):
            return None
        if offset is None:
            return None
        item = ReserveItem(
            record.key, record.parent, 0, len(record.digests), record.shard_bytes, record.tokens, record.tag
        )
        chunk = self._index[record.key] = self._unfinished[record.key] = Chunk.begin(item, "", offset, now)
        chunk.internal, chunk.source = True, source
        chunk.open = (_OURS,)
        return chunk

    def publish(self, chunk: Chunk, digests: list[int]) -> bool:
        """The bytes are in place and verified. False when it was taken back meanwhile."""
        chunk.close(_OURS)
        if chunk.dead:
            self._free_if_unheld(chunk)
            return False
        chunk.digests = list(digests)
        self._commit(chunk)
        return True

    def discard(self, chunk: Chunk) -> None:
        """The bytes did not come, or are wrong."""
        chunk.close(_OURS)
        if not chunk.dead:
            for tell in self.on_forgotten:  # a chunk of an earlier daemon that is not what the journal says
                tell(chunk)
        self._forget(chunk)

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
        late = [c for c in self._unfinished.values() if now - c.created > RESERVATION_S]
        for chunk in late:
            self._forget(chunk)
            self._m["cache_expired_total"].labels("reservation", "timeout").inc()
        for lid in [lid for lid, lease in self._leases.items() if lease.ends < now]:
            self._end_lease(lid)
            self._m["cache_expired_total"].labels("lease", "timeout").inc()

    # ---- looking ----

    def stats(self) -> dict[str, int]:
        return {
            "chunks": self._chunks,
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
            chunk = self._index[item.key] = self._unfinished[item.key] = Chunk.begin(item, writer, offset, now)
        elif not self._may_join(chunk, item, writer):
            self._m["cache_reserve_failures_total"].labels("exists").inc()
            return Grant(BUSY)
        rid = self._new_id()
        self._reservations[rid] = Reservation(chunk, item.shard, item.count, client)
        chunk.open = (*chunk.open, rid)
        return Grant(GRANTED, rid, chunk.offset + item.shard * chunk.stride)

    def _may_join(self, chunk: Chunk, item: ReserveItem, writer: str) -> bool:
        """Another worker of the same engine brings its own shard of a chunk that is being written."""
        if (
            chunk.internal
            or chunk.writer != writer
            or len(chunk.digests) != item.shards
            or chunk.shard_bytes != item.shard_bytes
        ):
            return False
        end = item.shard + item.count
        open_ = (self._reservations[r] for r in chunk.open)
        taken = any(r.shard < end and item.shard < r.shard + r.count for r in open_)
        return all(d is None for d in chunk.digests[item.shard : end]) and not taken

    def _commit(self, chunk: Chunk) -> None:
        chunk.committed, chunk.internal = True, False
        del self._unfinished[chunk.key]
        self._chunks += 1
        self._policy.add(chunk.key, chunk.parent)
        for tell in self.on_committed:
            tell(chunk)

    def _make_room(self, size: int, parent: bytes) -> int | None:
        self._largest = max(self._largest, size)
        high = size * 2 <= self._largest  # tails and other small chunks live at the far end
        while (offset := self.allocator.allocate(size, high=high)) is None:
            victim = self._policy.victim()
            # A prompt larger than the cache: evicting the parent would leave its child unreachable.
            if victim is None or victim == parent:
                return None
            self._forget(self._index[victim])
            self._evicted += 1
        return offset

    def _count_evictions(self) -> None:
        """Together: a counter's own cost is a good part of a chunk's."""
        if self._evicted:
            self._evictions.inc(self._evicted)
            self._evicted = 0

    def _forget(self, chunk: Chunk) -> None:
        """Out of the index now; the space when nobody holds it."""
        if chunk.dead:
            self._free_if_unheld(chunk)
            return
        chunk.dead = True
        del self._index[chunk.key]
        if chunk.committed:
            self._chunks -= 1
            self._policy.remove(chunk.key)
            for tell in self.on_forgotten:
                tell(chunk)
        else:
            del self._unfinished[chunk.key]
        self._free_if_unheld(chunk)

    def _free_if_unheld(self, chunk: Chunk) -> None:
        if chunk.dead and not chunk.open and not chunk.leases and chunk.offset >= 0:
            self.allocator.free(chunk.offset)
            chunk.offset = -1

    def _end_lease(self, lease: int) -> None:
        for chunk in self._leases.pop(lease).chunks:
            self.unhold(chunk)

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

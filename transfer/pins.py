"""Chunks that are kept from eviction for a while: a prefix that somebody pays for (`cache_control`). Runs in the loop.

A pin holds the chunk and its whole prefix. Each tenant has a quota, all together a larger one, so that pins can never fill
the cache; a pin ends with its time, or when its chunk is dropped.
"""

from __future__ import annotations

from pdserve.transfer.resident import Chunk
from pdserve.transfer.store import Store

#: shares of the arena that one tenant's pins, and everybody's, may hold
TENANT_SHARE, TOTAL_SHARE = 0.10, 0.50
MAX_TTL_S = 24 * 3600.0


class Pins:
    def __init__(self, store: Store, tenant_share: float = TENANT_SHARE, total_share: float = TOTAL_SHARE) -> None:
        self._store = store
        self._tenant_share, self._total_share = tenant_share, total_share
        self._until: dict[bytes, tuple[Chunk, float]] = {}
        self._bytes: dict[bytes, int] = {}  # by tenant's tag
        self.total = 0
        store.on_forgotten.append(self._forgotten)

    def pin(self, keys: list[bytes], ttl_s: float, now: float) -> tuple[int, int, str]:
        """(chunks pinned, chunks refused, why). Each key stands for its prefix; the root comes first."""
        pinned = refused = 0
        why = ""
        until = now + min(ttl_s, MAX_TTL_S)
        for key in keys:
            prefix = self._prefix(key)
            if not prefix:
                refused, why = refused + 1, why or "not in memory"
            for chunk in prefix:
                if (held := self._until.get(chunk.key)) is not None:
                    self._until[chunk.key] = (chunk, max(held[1], until))
                elif not self._fits(chunk):
                    refused, why = refused + 1, "over the quota"
                    continue
                else:
                    self._store.hold(chunk)
                    self._until[chunk.key] = (chunk, until)
                    self._count(chunk, chunk.size)
                pinned += 1
        return pinned, refused, why

    def unpin(self, keys: list[bytes]) -> int:
        """These chunks only, not their prefixes: others may build on those."""
        held = [key for key in keys if key in self._until]
        for key in held:
            self._end(key)
        return len(held)

    def expire(self, now: float) -> None:
        for key in [key for key, (_, until) in self._until.items() if until <= now]:
            self._end(key)

    def __len__(self) -> int:
        return len(self._until)

    def _prefix(self, key: bytes) -> list[Chunk]:
        """The visible chunks from the root to `key`; nothing when `key` itself is not visible."""
        chain: list[Chunk] = []
        while (chunk := self._store.peek(key)) is not None and chunk.committed:
            chain.append(chunk)
            key = chunk.parent
        return chain[::-1]

    def _fits(self, chunk: Chunk) -> bool:
        capacity = self._store.allocator.capacity
        mine = self._bytes.get(chunk.tag, 0) + chunk.size
        return mine <= self._tenant_share * capacity and self.total + chunk.size <= self._total_share * capacity

    def _count(self, chunk: Chunk, size: int) -> None:
        self.total += size
        left = self._bytes.get(chunk.tag, 0) + size
        if left:
            self._bytes[chunk.tag] = left
        else:
            self._bytes.pop(chunk.tag, None)

    def _end(self, key: bytes) -> None:
        chunk, _ = self._until.pop(key)
        self._count(chunk, -chunk.size)
        self._store.unhold(chunk)

    def _forgotten(self, chunk: Chunk) -> None:
        if chunk.key in self._until:
            self._end(chunk.key)

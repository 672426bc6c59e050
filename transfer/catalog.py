"""Lists of chunks, for people: what is where, what belongs to whom, what builds on what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pdserve.transfer.store import Store
from pdserve.transfer.tiering import Tiering
from pdserve.transfer.tiers.base import ChunkRecord


class Catalog:
    """Over memory and those lower tiers that can list what they have."""

    def __init__(self, store: Store, tiering: Tiering) -> None:
        self._store, self._tiering = store, tiering

    def keys_of_tag(self, tag: bytes) -> list[bytes]:
        return list({r.key for r in self._listed() if r.tag == tag})

    def keys_below(self, root: bytes) -> list[bytes]:
        """`root` and every chunk that builds on it, in memory or where tiers can be listed."""
        children: dict[bytes, list[bytes]] = {}
        for record in self._listed():
            children.setdefault(record.parent, []).append(record.key)
        keys, rest = {root}, [root]
        while rest:
            fresh = [k for k in children.get(rest.pop(), ()) if k not in keys]
            keys.update(fresh)
            rest += fresh
        return list(keys)

    def _listed(self) -> Iterator[ChunkRecord]:
        yield from (chunk.record() for chunk in self._store.chunks())
        for lower in self._tiering.lowers:
            if hasattr(lower.tier, "records"):
                yield from lower.tier.records()

    def objects(self, tier: str) -> list[dict[str, Any]] | None:
        """What GET /cache/objects lists; None when that tier is not here or cannot be listed."""
        if tier == "dram":
            return [{**_shown(c.record()), "leases": c.leases, "tier": tier} for c in self._store.chunks()]
        for lower in self._tiering.lowers:
            if lower.name == tier and hasattr(lower.tier, "records"):
                return [{**_shown(record), "tier": tier} for record in lower.tier.records()]
        return None


def _shown(r: ChunkRecord) -> dict[str, Any]:
    return {
        "key": r.key.hex(),
        "parent": r.parent.hex(),
        "tokens": r.tokens,
        "bytes": r.payload_bytes,
        "digests": [f"{d:016x}" for d in r.digests],
        "tag": r.tag.hex(),
    }

"""Lists of chunks, for people: what is where, what belongs to whom, what builds on what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

from pdserve.transfer.store import Store
from pdserve.transfer.tiering import Tiering
from pdserve.transfer.tiers.base import ChunkRecord
from pdserve.transfer.wipe import Choose


class Catalog:
    """Over memory and those lower tiers that can list what they have."""

    def __init__(self, store: Store, tiering: Tiering) -> None:
        self._store, self._tiering = store, tiering

    def of_tag(self, tag: bytes) -> tuple[list[bytes], Choose]:
        """The keys that this host knows of, and how to tell others in a tier that is not listed here."""

        def choose(records: Iterable[ChunkRecord]) -> list[bytes]:
            return list({r.key for r in records if r.tag == tag})

        here = [chunk.key for chunk in self._store.chunks() if chunk.tag == tag]  # no record of each: the loop waits
        return list({*here, *choose(self._listed_below())}), choose

    def below(self, root: bytes) -> tuple[list[bytes], Choose]:
        """`root` and every chunk that builds on it; as of_tag()."""
        here = ((chunk.parent, chunk.key) for chunk in self._store.chunks())
        known = _closure({root}, chain(here, _links(self._listed_below())))
        return list(known), lambda records: list(_closure(known, _links(records)))

    def _listed_below(self) -> Iterator[ChunkRecord]:
        for lower in self._tiering.lowers:
            if hasattr(lower.tier, "records"):
                yield from lower.tier.records()

    def listable(self) -> list[str]:
        """Names of the tiers that objects() can list."""
        return ["dram", *(lower.name for lower in self._tiering.lowers if hasattr(lower.tier, "records"))]

    def objects(self, tier: str, offset: int, limit: int) -> tuple[int, list[dict[str, Any]]] | None:
        """How many GET /cache/objects has to list, and some of them; None when that tier is not here or cannot be listed.
        Only what is shown is put into words: there may be a hundred thousand, and requests wait meanwhile."""
        if tier == "dram":
            some = islice(self._store.chunks(), offset, offset + limit)
            return self._store.stats()["chunks"], [
                {**_shown(c.record()), "leases": c.leases, "tier": tier} for c in some
            ]
        for lower in self._tiering.lowers:
            if lower.name == tier and hasattr(lower.tier, "records"):
                records = lower.tier.records()
                return len(records), [{**_shown(record), "tier": tier} for record in records[offset : offset + limit]]
        return None


def _links(records: Iterable[ChunkRecord]) -> Iterator[tuple[bytes, bytes]]:
    return ((record.parent, record.key) for record in records)


def _closure(roots: set[bytes], links: Iterable[tuple[bytes, bytes]]) -> set[bytes]:
    """`roots` and what builds on them, by (parent, key) of all."""
    children: dict[bytes, list[bytes]] = {}
    for parent, key in links:
        children.setdefault(parent, []).append(key)
    keys, rest = set(roots), list(roots)
    while rest:
        fresh = [k for k in children.get(rest.pop(), ()) if k not in keys]
        keys.update(fresh)
        rest += fresh
    return keys


def _shown(r: ChunkRecord) -> dict[str, Any]:
    return {
        "key": r.key.hex(),
        "parent": r.parent.hex(),
        "tokens": r.tokens,
        "bytes": r.payload_bytes,
        "digests": [f"{d:016x}" for d in r.digests],
        "tag": r.tag.hex(),
    }

"""Chunks that peers push to us: space for them, their digests, their publication. Runs in the daemon's loop.

A chunk is begun with the first of its shards that is offered and published when all of them have arrived; the transport
compares each with the digest that it was offered under before it says so. Whatever goes wrong with one shard, the whole
chunk is given up; its space goes back when the transport has ended every slot that it was lent, not earlier.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve import log
from pdserve.chunk import FORMAT_VERSION
from pdserve.errors import ProtocolError
from pdserve.transfer.peers import messages
from pdserve.transfer.resident import Chunk
from pdserve.transfer.store import Store
from pdserve.transfer.tiers.base import ChunkRecord
from pdserve.transfer.transports.base import Offer, Outcome, Slot

#: share of the arena that may be on its way in
IN_SHARE = 4
#: a chunk of which some shards were offered and the others were not is given up after so long
HALF_S = 10.0
TIER = "peer"


@dataclass(eq=False)
class Incoming:
    """A chunk on its way in."""

    chunk: Chunk
    peer: str
    began: float
    digests: list[int | None]
    open: int = 0  # slots that the transport may still write into
    failed: str = ""
    touched: float = 0.0

    @property
    def whole(self) -> bool:
        return all(d is not None for d in self.digests)


class Inbox:
    """`ended(key, incoming, reason)`: it is published ("") or was given up. `after`: the store has changed."""

    def __init__(
        self,
        store: Store,
        metrics: dict[str, Any],
        ended: Callable[[bytes, Incoming, str], None],
        after: Callable[[], None],
    ) -> None:
        self._store, self._m, self._ended, self._after = store, metrics, ended, after
        self._coming: dict[bytes, Incoming] = {}
        self._nbytes = 0
        self._log = log.get("peers")
        self.draining = False

    def __len__(self) -> int:
        return len(self._coming)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def coming(self, key: bytes) -> bool:
        incoming = self._coming.get(key)
        return incoming is not None and not incoming.failed

    def reserve(self, peer: str, offers: Sequence[Offer]) -> list[Slot | str]:
        now = time.monotonic()
        answers = [self._reserve(peer, offer, now) for offer in offers]
        self._after()  # space may have been taken from chunks that were there: told before anybody writes into it
        return answers

    def _reserve(self, peer: str, offer: Offer, now: float) -> Slot | str:
        if self.draining:
            return "this daemon is draining"
        try:
            meta = messages.decode_meta(offer.meta)
        except ProtocolError as e:
            return str(e)
        if offer.shard >= meta.shards or offer.length != meta.shard_bytes:
            return f"shard {offer.shard} of {offer.length} bytes does not fit its own description"
        incoming = self._coming.get(offer.key)
        if not offer.digest:
            return "no digest was announced"  # the transport would not compare it
        if incoming is None:
            found = self._begin(peer, offer.key, meta, now)
            if isinstance(found, str):
                return found
            incoming = found
        chunk = incoming.chunk
        if incoming.peer != peer or incoming.failed:
            return "somebody else brings it"
        if len(chunk.digests) != meta.shards or chunk.shard_bytes != meta.shard_bytes:
            return "it is described otherwise than before"
        if incoming.digests[offer.shard] is not None:
            return "offered twice"
        incoming.digests[offer.shard] = offer.digest
        incoming.open += 1
        incoming.touched = now
        return Slot(chunk.offset + offer.shard * chunk.stride, offer.length, (incoming, offer.shard))

    def _begin(self, peer: str, key: bytes, meta: messages.Meta, now: float) -> Incoming | str:
        if meta.format != FORMAT_VERSION:
            return f"chunks of format {meta.format}, here they are of {FORMAT_VERSION}"
        if self._store.peek(key) is not None:
            return "it is here"
        size = meta.shard_bytes * meta.shards
        if self._coming and self._nbytes + size > self._store.allocator.capacity // IN_SHARE:
            return "too much is on its way in"
        record = ChunkRecord(meta.format, key, meta.parent, meta.tokens, meta.shard_bytes, [0] * meta.shards, meta.tag)
        chunk = self._store.begin(record, TIER, now)
        if chunk is None:
            return "no room"
        incoming = self._coming[key] = Incoming(chunk, peer, now, [None] * meta.shards)
        self._nbytes += chunk.size
        return incoming

    def done(self, slot: Slot, outcome: Outcome) -> None:
        """The transport writes no more into this slot."""
        assert isinstance(slot.context, tuple)
        incoming: Incoming = slot.context[0]
        incoming.open -= 1
        incoming.touched = time.monotonic()
        if not outcome.ok and not incoming.failed:
            incoming.failed = f"{outcome.state}: {outcome.reason}"
            if outcome.state == "corrupt":
                self._m["cache_digest_failures_total"].labels(TIER).inc()
                self._log.error(
                    "digest mismatch of what %s sent, dropped: %s", incoming.peer, incoming.chunk.key.hex()[:16]
                )
        if incoming.open:
            return
        if incoming.failed:
            self._give_up(incoming)
        elif incoming.whole:
            self._publish(incoming)

    def _publish(self, incoming: Incoming) -> None:
        self._remove(incoming)
        digests = [d for d in incoming.digests if d is not None]
        taken_back = not self._store.publish(incoming.chunk, digests)
        self._ended(incoming.chunk.key, incoming, "taken back" if taken_back else "")
        self._after()

    def _give_up(self, incoming: Incoming) -> None:
        self._remove(incoming)
        self._store.discard(incoming.chunk)
        self._ended(incoming.chunk.key, incoming, incoming.failed)
        self._after()

    def _remove(self, incoming: Incoming) -> None:
        self._coming.pop(incoming.chunk.key, None)
        self._nbytes -= incoming.chunk.size

    def tick(self, now: float) -> None:
        for incoming in list(self._coming.values()):
            if not incoming.open and now - incoming.touched > HALF_S:
                incoming.failed = "the rest of it was never offered"
                self._give_up(incoming)

    def close(self) -> None:
        """After the transport has ended: nothing writes any more, so everything left is given up."""
        for incoming in list(self._coming.values()):
            incoming.failed = incoming.failed or "the daemon ends"
            self._give_up(incoming)

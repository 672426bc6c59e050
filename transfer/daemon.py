"""The cache process of a host: one arena, one index, a unix socket for the engines, HTTP for people and Prometheus.

The loop only moves keys and offsets, so one thread serves it all; lower tiers have threads of their own (tiering.py).
serving.py makes a process of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry

from pdserve import log
from pdserve.errors import ConfigError, ProtocolError
from pdserve.metrics.cache import CACHE
from pdserve.metrics.metric import build
from pdserve.trace import Tracing
from pdserve.transfer import arena, faults, journal, scrub, tracing, wire
from pdserve.transfer.catalog import Catalog
from pdserve.transfer.connection import Connection
from pdserve.transfer.eviction import POLICIES
from pdserve.transfer.flows import Flows
from pdserve.transfer.gone import Gone
from pdserve.transfer.held import Held
from pdserve.transfer.journal import Journal
from pdserve.transfer.lower import Rules
from pdserve.transfer.peers.node import Node
from pdserve.transfer.pins import Pins
from pdserve.transfer.requests import Requests
from pdserve.transfer.resident import Chunk
from pdserve.transfer.scrub import Scrubber
from pdserve.transfer.store import Store
from pdserve.transfer.tiering import Tiering
from pdserve.transfer.tiers.base import Tier
from pdserve.transfer.wipe import Choose, Outcome

#: what is queued for a lower tier when the daemon is told to stop gets so long
DRAIN_S = 3.0
#: notes of evicted chunks that are written down before the next requests are looked at
A_TURN = 32
_OPS = {
    wire.Lookup: "lookup",
    wire.Reserve: "reserve",
    wire.Commit: "commit",
    wire.Abort: "abort",
    wire.Release: "release",
    wire.Ping: "ping",
    wire.Prefetch: "prefetch",
    wire.Push: "push",
}


class Daemon:
    """State of the process: what the connections share. No globals, so a test may hold two."""

    def __init__(
        self,
        *,
        name: str,
        size: int,
        chunk_tokens: int,
        policy: str = "lru",
        tiers: Sequence[tuple[Tier, Rules]] = (),
        scrub_rate: int = scrub.DEFAULT_RATE,
        fault: faults.Fault = faults.none,
    ) -> None:
        if policy not in POLICIES:
            raise ConfigError("cache.policy", f"unknown policy {policy!r}", f"Known: {', '.join(sorted(POLICIES))}.")
        self.name, self.chunk_tokens, self.policy = name, chunk_tokens, policy
        self.daemon_id = uuid.uuid4().hex
        self.started = time.time()
        self.registry = CollectorRegistry()
        self.metrics = build(CACHE, self.registry)
        self.log = log.get("cache")
        self.fault = fault
        path = arena.path_for(name)
        self.journal = Journal(journal.path_for(path), fault)
        self._left = self.journal.read(size)
        found = arena.reopen(path, size) if self._left else None
        if found is None:
            self._left = []
            found = arena.create(path, size, self._progress(size))
        self.arena, self.huge_bytes = found, found.huge_bytes()
        self.journal.begin(size, self._left)
        self.store = Store(self.arena.size, POLICIES[policy](), self.metrics)
        self.store.on_committed.append(self.journal.committed)
        self.store.on_forgotten.append(self.journal.forgotten)
        self.gone = Gone()
        self.requests = Requests(self.gone, self._left_alone, self.started)
        self.held = Held(self.daemon_id, self._there)
        self.requests.on_prompt = self.held.asked
        self.store.on_committed.append(lambda chunk: self.held.came(chunk.key))
        self.store.on_forgotten.append(self._forgotten)
        self.spans: tracing.Spans | None = None  # made by trace()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.tiering = Tiering(self.store, lambda: self.arena.bytes, self.metrics, self._post, fault)
        for tier, rules in tiers:
            if (register := getattr(tier, "register", None)) is not None:
                register(self.arena.bytes)
            if hasattr(tier, "on_evicted"):
                tier.on_evicted = self._evicted_below_now
            self.tiering.add(tier, rules)
        self.tiering.on_read = self._was_read
        self._evicted_below: dict[str, int] = {}
        self.pins = Pins(self.store)
        self.catalog = Catalog(self.store, self.tiering)
        self.scrubber: Scrubber | None = None
        self.scrub_rate = scrub_rate
        self.node: Node | None = None  # set by peers.attach where there are other hosts
        self.clients: dict[int, Connection] = {}
        self._next_client = 0
        self.answered = 0
        self.flows = Flows(self.metrics["cache_engine_bytes_total"])
        self._op_seconds = {op: self.metrics["cache_op_seconds"].labels(op) for op in _OPS.values()}

    def trace(self, to: Tracing) -> None:
        """From now on, what requests do here is told to `to`."""
        self.spans = tracing.Spans(to, self.requests.arrivals)
        self.requests.on_told = self.spans.told

    def _forgotten(self, chunk: Chunk) -> None:
        self.gone.removed(chunk.key, "dram", self.store.removing, time.time())
        self.held.went(chunk.key, self.store.removing == "capacity")

    def _there(self, key: bytes) -> bool:
        chunk = self.store.peek(key)
        return chunk is not None and chunk.committed

    def _was_read(self, key: bytes, tier: str, outcome: str, seconds: float, nbytes: int) -> None:
        if outcome:
            self.gone.removed(key, tier, outcome, time.time())
        else:
            self.gone.arrived(key, tier, seconds, nbytes, time.time())

    def _evicted_below_now(self, keys: set[bytes]) -> None:
        """Called on a tier's thread."""
        now, left = time.time(), list(keys)

        def note() -> None:
            for key in left[-A_TURN:]:
                self.gone.removed(key, "disk", "capacity", now)
            del left[-A_TURN:]
            if left and self.loop is not None:  # a whole segment went: requests come first
                self.loop.call_soon(note)

        self._post(note)

    def _left_alone(self) -> list[str]:
        """Lower tiers that are not asked at present because they failed."""
        return [lower.name for lower in self.tiering.lowers if getattr(lower.tier, "left_alone", False)]

    def _progress(self, size: int) -> Any:
        last = [time.monotonic()]

        def tell(done: int) -> None:
            if time.monotonic() - last[0] > 1:
                last[0] = time.monotonic()
                self.log.info("touching shared memory: %d of %d MiB", done >> 20, size >> 20)

        return tell

    def _post(self, function: Callable[[], None]) -> None:
        """Runs it on the loop; called from tiers' threads. After the end there is nobody left to tell."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._and_flush, function)

    def _and_flush(self, function: Callable[[], None]) -> None:
        function()
        self.journal.flush()

    def recover(self) -> None:
        """Takes up what an earlier daemon left in the arena, once its digests are verified. The loop must run."""
        left, self._left = self._left, []
        if left:
            placed = self.tiering.verify_in_place(left)
            self.log.info("%d chunks are in the arena from before; each is found again once it is verified", placed)

    def protocol(self) -> Connection:
        self._next_client += 1
        return Connection(self, self._next_client)

    def welcome(self) -> wire.Welcome:
        return wire.Welcome(wire.VERSION, self.daemon_id, str(self.arena.path), self.arena.size, self.chunk_tokens)

    def answer(self, message: wire.Request, client: int) -> wire.Reply:
        """One request, carried out on the store."""
        started = time.perf_counter()
        now = time.monotonic()
        reply: wire.Reply
        match message:
            case wire.Lookup():
                reply = self._lookup(message, client, now)
            case wire.Reserve():
                self.gone.making_room_for = self.instance_of(client)
                grants = self.store.reserve(message.items, message.writer, client, now)
                reply = wire.ReserveReply(message.id, grants)
                for item, grant in zip(message.items, grants, strict=True):
                    if grant.status in (wire.FULL, wire.TOO_LARGE):
                        self.gone.removed(item.key, "dram", "full", time.time())
                self.gone.making_room_for = ""
                self.tiering.writing.relieve()
            case wire.Commit():
                before = self.store.written
                reply = wire.Ok(message.id, self.store.commit(message.items, client))
                self.flows.stored(self.instance_of(client), self.store.written - before)
                self.fault("store.commit")
            case wire.Abort():
                reply = wire.Ok(message.id, self.store.abort(message.reservations, client))
            case wire.Release():
                reply = wire.Ok(message.id, self._release(message, client))
            case wire.Prefetch():
                reply = wire.Ok(message.id, self.tiering.loading(message.keys, now))
            case wire.Ping():
                reply = wire.Ok(message.id)
            case wire.Push():
                reply = wire.Ok(message.id, self.node.giving.push(message.target, message.keys, now) if self.node else 0)
            case _:
                raise ProtocolError(f"a {type(message).__name__} is not expected here")
        self.journal.flush()  # before anybody learns of it: space that is granted anew must not count as the old chunk's
        self._op_seconds[_OPS[type(message)]].observe(time.perf_counter() - started)
        self.answered += 1
        return reply

    def instance_of(self, client: int) -> str:
        """The engine's name, by that of its connection."""
        connection = self.clients.get(client)
        return connection.label.partition("/")[0] if connection is not None else ""

    def _lookup(self, message: wire.Lookup, client: int, now: float) -> wire.LookupReply:
        if self.node is not None and message.prefill_speed:
            self.node.fetching.prefill_speed = message.prefill_speed
        began = time.perf_counter()
        lease, found, pending = self.store.lookup(message.keys, client, now)
        if self.spans is not None:
            seconds = time.perf_counter() - began
            self.spans.looked_up(message.keys, len(found), time.time() - seconds, seconds)
        missing = len(message.keys) - len(found)
        loading = self.tiering.loading(message.keys[len(found) :], now) if missing else 0
        if not loading and not pending:  # else the client asks again
            self.metrics["cache_lookups_total"].inc()
            self.metrics["cache_lookup_chunks_total"].labels("hit").inc(len(found))
            self.metrics["cache_lookup_chunks_total"].labels("miss").inc(missing)
        return wire.LookupReply(message.id, lease, found, pending, loading, self.store.dropped)

    def _release(self, message: wire.Release, client: int) -> int:
        loaded = self.store.loaded(message.lease, client, message.loaded_chunks)
        for chunk in loaded:
            self.metrics["cache_loaded_chunks_total"].labels(chunk.source).inc()
            self.metrics["cache_loaded_bytes_total"].labels(chunk.source).inc(chunk.payload_bytes)
            self.metrics["cache_loaded_tokens_total"].labels(chunk.source).inc(chunk.tokens)
            self.flows.loaded(self.instance_of(client), chunk.source, chunk.payload_bytes)
            chunk.source = "dram"
        self.tiering.writing.used(loaded)
        if message.corrupt:
            self.metrics["cache_digest_failures_total"].labels("dram").inc(len(message.corrupt))
            self.log.error("digest mismatch in dram, dropped: %s", " ".join(k.hex()[:16] for k in message.corrupt))
            self.store.drop(message.corrupt, "corrupt")
        return int(self.store.release(message.lease, client))

    def drop(self, keys: list[bytes], choose: Choose | None = None) -> tuple[int, Outcome]:
        """Out of every tier, see Tiering.delete(); returns how many were in memory, and what comes of the lower tiers."""
        count = self.store.drop(keys, "dropped")
        outcome = self.tiering.delete(keys, choose)
        self.journal.flush()
        return count, outcome

    def clear(self, shared: bool = False) -> tuple[int, Outcome]:
        """Everything; what is in tiers that other hosts use only if they are meant, too."""
        count = self.store.clear()
        outcome = self.tiering.clear(shared)
        self.journal.flush()
        return count, outcome

    def config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "size": self.arena.size,
            "chunk_tokens": self.chunk_tokens,
            "policy": self.policy,
            "scrub_rate": self.scrub_rate,
            "tiers": {x.name: dataclasses.asdict(x.rules) for x in self.tiering.lowers},
        }

    def refresh_gauges(self) -> None:
        """Brings the gauges up to date; called when somebody looks."""
        stats = self.store.stats()
        self.metrics["cache_used_bytes"].labels("dram").set(stats["used_bytes"])
        self.metrics["cache_chunks"].labels("dram").set(stats["chunks"])
        self.metrics["cache_leases"].set(stats["leases"])
        self.metrics["cache_reservations"].set(stats["reservations"])
        self.metrics["cache_clients"].set(len(self.clients))
        if self.node is not None:
            self.node.refresh_gauges()
        self.metrics["cache_pinned_bytes"].set(self.pins.total)
        self.metrics["cache_scrub_progress"].set(self.scrubber.progress if self.scrubber else 1.0)
        for name, facts in self.tiering.stats().items():
            self.metrics["cache_capacity_bytes"].labels(name).set(facts["capacity_bytes"])
            self.metrics["cache_used_bytes"].labels(name).set(facts["used_bytes"])
            self.metrics["cache_chunks"].labels(name).set(facts["chunks"])
            self.metrics["cache_tier_up"].labels(name).set(facts["state"] == "ok")
            self.metrics["cache_tier_queue"].labels(name, "up").set(facts["queued_up"])
            self.metrics["cache_tier_queue"].labels(name, "down").set(facts["queued_down"])
            evicted = facts.get("evicted_chunks", 0)
            before, self._evicted_below[name] = self._evicted_below.get(name, 0), evicted
            self.metrics["cache_evictions_total"].labels(name, "capacity").inc(max(0, evicted - before))

    def status(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "pid": os.getpid(),
            "daemon_id": self.daemon_id,
            "uptime_s": round(time.time() - self.started, 1),
            "chunk_tokens": self.chunk_tokens,
            "arena": str(self.arena.path),
            "huge_bytes": self.huge_bytes,
            "clients": [c.label for c in self.clients.values()],
            **self.store.stats(),
            "pinned_bytes": self.pins.total,
            "told": self.requests.stats(),
            "recovering": self.tiering.recovering,
            "tiers": self.tiering.stats(),
            "peers": self.node.status() if self.node else {},
            "scrub": dict(self.scrubber.state) if self.scrubber else {},
        }

    def close(self) -> None:
        if self.spans is not None:
            self.spans.stop()
        self.tiering.close(DRAIN_S)
        self.journal.close(keep=False)
        self.arena.close()
        with contextlib.suppress(FileNotFoundError):
            self.arena.path.unlink()

"""DRAM and what lies below it: chunks are brought up when somebody asks for them; how they get there is in writing.py.

The store belongs to the daemon's loop, so everything here runs there, too, except the tiers' own calls, which run on a
few threads for each tier and come back through `post`. Both ways are bounded, in number, bytes and time. A read that
fails, comes late or brings wrong bytes is a miss. No engine waits for it longer than it has agreed to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pdserve import kernels, log
from pdserve.transfer import faults
from pdserve.transfer.allocator import align
from pdserve.transfer.below import Below
from pdserve.transfer.lower import WRITE_POLICIES, InPlace, Lower, Rules
from pdserve.transfer.remote import Remote
from pdserve.transfer.resident import Chunk
from pdserve.transfer.store import Store
from pdserve.transfer.tiers.base import ChunkRecord, CorruptChunk, Tier, TierError
from pdserve.transfer.wipe import Choose, Outcome, Wipe
from pdserve.transfer.writing import Writing

#: a key that could not be brought up is not tried again for so long
AGAIN_S = 1.0
#: a chunk that would take longer than this to arrive, by what the tier did lately, is not promised to anybody
PROMISE_S = 5.0
#: share of the arena that may be on its way up
UP_SHARE = 4


@dataclass
class _Load:
    """A chunk on its way up."""

    chunk: Chunk
    record: ChunkRecord
    deadline: float
    promised: bool
    unwanted: bool = False  # deleted meanwhile


class Beyond(Protocol):
    """Where chunks may come from that are on no tier of this host (peers/node.py)."""

    def ask(self, keys: Sequence[bytes], now: float) -> None:
        """`keys` begins with one that is nowhere here. May begin to fetch the run."""

    def coming(self, key: bytes, now: float) -> bool:
        """Whether it is on its way and worth waiting for."""


@dataclass
class Tiering:
    """The glue. `post` runs a function on the loop, from any thread; `arena` gives the arena's bytes."""

    store: Store
    arena: Callable[[], np.ndarray]
    metrics: dict[str, Any]
    post: Callable[[Callable[[], None]], object]
    fault: faults.Fault = faults.none
    lowers: list[Lower] = field(default_factory=list)
    #: other hosts, asked for what is nowhere here
    beyond: Beyond | None = None
    #: told of every read of a lower tier: key, tier, outcome ("" is well), seconds, bytes
    on_read: Callable[[bytes, str, str, float, int], None] = lambda *_: None

    def __post_init__(self) -> None:
        self._log = log.get("tiers")
        self._not_before: dict[bytes, float] = {}
        self._loads: dict[bytes, _Load] = {}
        self._closing = False
        self._recovery: Lower | None = None
        self._below = Below(self.store, self.lowers, self.metrics, self.post)
        self.wipe, self.remote = Wipe(self._below), Remote(self._below)
        self.writing = Writing(self._below, self.shards)

    def add(self, tier: Tier, rules: Rules) -> None:
        """Tiers are asked in the order in which they are added."""
        if rules.write not in WRITE_POLICIES:
            raise ValueError(f"unknown write policy {rules.write!r}; known: {', '.join(WRITE_POLICIES)}")
        lower = Lower(tier, rules, 1 << len(self.lowers))
        lower.write = lambda writes: self.writing.on_thread(lower, writes)
        self.lowers.append(lower)

    # ---- up ----

    def loading(self, keys: list[bytes], now: float) -> int:
        """How many of `keys`, up to the first that is nowhere, are on their way up; starts what is not yet.

        Keys in between that are in DRAM already, or that an engine is writing, do not end the run.
        """
        if not self.lowers and self._recovery is None and self.beyond is None:
            return 0
        if not self._closing:
            self.remote.ask(keys, now)
        coming = 0
        for i, key in enumerate(keys):
            chunk = self.store.peek(key)
            if chunk is None:
                if not self._start(key, now) and not self._from_beyond(keys, i, now):
                    break
                coming += 1
            elif chunk.internal:
                load = self._loads.get(key)
                if load is None:
                    if self.beyond is None or not self.beyond.coming(key, now):
                        break
                elif not load.promised or now > load.deadline:
                    break
                coming += 1
        return coming

    def below(self, key: bytes) -> bool:
        """Whether a lower tier has it, as far as is known."""
        return self._find(key) is not None

    # ---- for other hosts, which may be given what is on this one's disk (peers/giving.py) ----

    def on_disk(self, key: bytes) -> bool:
        """Whether a tier has it that is this host's own."""
        return any(lower.indexed and lower.tier.contains([key])[0] is not None for lower in self.lowers)

    def bring_up(self, key: bytes, now: float) -> bool:
        """Begins to; whether it is on its way."""
        if self.store.peek(key) is None:
            self._start(key, now)
        return key in self._loads

    def watch_disk(self, told: Callable[[bytes, bool], None]) -> list[bytes] | None:
        """The keys on disk, None where there is no disk; from now on tells of each that comes or goes, in the loop."""

        def tell(keys: list[bytes], here: bool) -> None:
            for key in keys:
                told(key, here)

        watching = [watch for lower in self.lowers if (watch := getattr(lower.tier, "watch", None)) is not None]
        if not watching:
            return None
        return [key for watch in watching for key in watch(lambda keys, here: self.post(lambda: tell(keys, here)))]

    def disk_speed(self) -> float:
        """Bytes per second that came from it lately."""
        return max((lower.rate for lower in self.lowers if lower.indexed), default=0.0)

    def _from_beyond(self, keys: list[bytes], i: int, now: float) -> bool:
        if self.beyond is None or self._closing:
            return False
        if not self.beyond.coming(keys[i], now):
            self.beyond.ask(keys[i:], now)
        return self.beyond.coming(keys[i], now)

    def verify_in_place(self, records: list[tuple[ChunkRecord, int]]) -> int:
        """What the journal says is in the arena: found again once its digests are verified. Returns how many fitted."""
        if not records:
            return 0
        self._recovery = Lower(InPlace(), Rules(readers=2))
        placed = 0
        for record, offset in records:
            chunk = self.store.begin(record, "dram", float("inf"), offset)
            if chunk is None:
                self.metrics["cache_recovered_chunks_total"].labels("dropped").inc()
                continue
            placed += 1
            self._read(self._recovery, _Load(chunk, record, float("inf"), True))
        return placed

    def _find(self, key: bytes) -> tuple[Lower, ChunkRecord] | None:
        for lower in self.lowers:
            if lower.indexed:
                (record,) = lower.tier.contains([key])
                if record is not None:
                    return lower, record
        return self.remote.found(key)

    def _start(self, key: bytes, now: float) -> bool:
        """Begins to bring a chunk up; False when nobody should wait for it."""
        if self._closing or self._not_before.get(key, 0.0) > now:
            return False
        found = self._find(key)
        if found is None:
            return self.remote.asking(key, now)
        lower, record = found
        if not lower.may_give(key):
            return False
        size = align(record.shard_bytes) * len(record.digests)
        promised = lower.seconds_for(size) <= PROMISE_S
        if lower.up_bytes and lower.up_bytes + size > self.store.allocator.capacity // UP_SHARE:
            return promised  # its turn comes when others have arrived
        if not promised and lower.up:
            return False  # one at a time shows whether the tier has become faster
        chunk = self.store.begin(record, lower.name, now)
        if chunk is None:
            self._not_before[key] = now + AGAIN_S
            self.metrics["cache_tier_failures_total"].labels(lower.name, "get", "no_room").inc()
            return False
        self.fault("promote.begin")
        chunk.below |= lower.bit
        self._read(lower, _Load(chunk, record, now + lower.rules.get_s, promised))
        return promised

    def _read(self, lower: Lower, load: _Load) -> None:
        self._loads[load.record.key] = load
        lower.up += 1
        lower.up_bytes += load.chunk.size
        into = self.shards(load.chunk)
        lower.call_up(lambda: self._read_on_thread(lower, load, into))

    def _read_on_thread(self, lower: Lower, load: _Load, into: list[np.ndarray]) -> None:
        started = time.monotonic()
        outcome, why = "", ""
        try:
            if started > load.deadline:
                outcome = "late"
            elif not lower.tier.get(load.record, into, load.deadline):
                outcome = "gone"
            else:
                self.fault("promote.read")
                if [kernels.digest(shard) for shard in into] != load.record.digests:
                    outcome, why = "corrupt", "the bytes do not match their digest"
                    getattr(lower.tier, "quarantine", lambda key: lower.tier.delete([key]))(load.record.key)
        except CorruptChunk as e:
            outcome, why = "corrupt", str(e)
        except TierError as e:
            outcome, why = ("late" if time.monotonic() > load.deadline else "error"), str(e)
        except Exception as e:  # noqa: BLE001 - a tier is somebody else's code: whatever it was, it is a miss
            outcome, why = "error", f"{type(e).__name__}: {e}"
        seconds = time.monotonic() - started
        self.post(lambda: self._read_done(lower, load, outcome, why, seconds))

    def _read_done(self, lower: Lower, load: _Load, outcome: str, why: str, seconds: float) -> None:
        size, key = load.record.payload_bytes, load.record.key
        if self._loads.get(key) is load:
            del self._loads[key]
        lower.up -= 1
        lower.up_bytes -= load.chunk.size
        if lower is self._recovery:
            self.metrics["cache_recovered_chunks_total"].labels("dropped" if outcome else "kept").inc()
        else:
            self.metrics["cache_tier_seconds"].labels(lower.name, "get").observe(seconds)
            if outcome != "gone":
                # Failures count as slow, so that a tier that only fails is not promised from either.
                rate = 0.0 if outcome else size * lower.rules.readers / max(seconds, 1e-6)
                lower.rate = max(1.0, 0.7 * lower.rate + 0.3 * rate)
        self.on_read(key, lower.name, outcome, seconds, size)
        if load.unwanted:
            self.store.discard(load.chunk)
            return
        if outcome:
            self._not_before[key] = time.monotonic() + AGAIN_S
            self._below.failed(lower.name, "get", outcome, f"{why} (key {key.hex()[:16]})")
            if outcome in ("gone", "corrupt"):
                self.remote.forget(key)  # what it said of the key is no longer so
            self.store.discard(load.chunk)
            return
        self.fault("promote.publish")
        if self.store.publish(load.chunk, load.record.digests) and lower is not self._recovery:
            self.metrics["cache_tier_chunks_total"].labels(lower.name, "up").inc()
            self.metrics["cache_tier_bytes_total"].labels(lower.name, "up").inc(size)
            self.metrics["cache_tier_tokens_total"].labels(lower.name, "up").inc(load.record.tokens)

    # ---- forgetting, looking, ending ----

    def delete(self, keys: list[bytes], choose: Choose | None = None) -> Outcome:
        """From every lower tier, and there also what `choose` picks of what a remote one lists; what is on its way up is
        dropped."""
        self._unwanted(keys if choose is None else [*keys, *self._loads])
        if choose is not None:  # what remote tiers said before may be about to go
            self.remote.forget_all()
        return self.wipe.keys(keys, choose)

    def clear(self, shared: bool = False) -> Outcome:
        """`shared`: also what other hosts may use."""
        self._unwanted(list(self._loads))
        if shared:
            self.remote.forget_all()
        return self.wipe.everything(shared)

    def _unwanted(self, keys: list[bytes]) -> None:
        for key in keys:
            self.remote.forget(key)
            if key in self._loads:
                self._loads[key].unwanted = True
                self.store.drop([key], "dropped")

    @property
    def deleting(self) -> bool:
        """Whether a tier has not yet carried out what delete() or clear() asked for."""
        return self.wipe.busy

    def tick(self, now: float) -> None:
        """About once a second: forgets what is out of date."""
        self._not_before = {k: t for k, t in self._not_before.items() if t > now}
        self.remote.tick(now)
        for lower in self.lowers:
            if not lower.up and lower.rate < 10e6:
                lower.rate *= 1.5  # a tier that failed gets its chance again by and by
        if self._recovery is not None and not self._recovery.up:
            recovery, self._recovery = self._recovery, None
            recovery.close(now + 1.0)
            self._log.info("every chunk that was left in the arena is verified")
        self.writing.relieve()

    def stats(self) -> dict[str, dict[str, Any]]:
        return {
            lower.name: {
                **lower.tier.stats(),
                "write": lower.rules.write,
                "queued_up": lower.up,
                "queued_down": lower.down,
            }
            for lower in self.lowers
        }

    @property
    def recovering(self) -> int:
        return self._recovery.up if self._recovery else 0

    def close(self, drain_s: float) -> None:
        """Ends the threads; what is queued to be written gets `drain_s` seconds. The loop need not run any more."""
        self._closing = self.writing.closing = True
        deadline = time.monotonic() + drain_s
        for lower in [*self.lowers, *([self._recovery] if self._recovery else [])]:
            lower.close(deadline)

    def shards(self, chunk: Chunk) -> list[np.ndarray]:
        """Where its bytes are."""
        whole = self.arena()
        starts = [chunk.offset + i * chunk.stride for i in range(len(chunk.digests))]
        return [whole[start : start + chunk.shard_bytes] for start in starts]

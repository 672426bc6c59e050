"""A cache daemon as the page shows it: its /status and its /metrics, asked with a deadline, never waited for."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from pdserve.proxy.dashboard.figures import rate, rates
from pdserve.proxy.exposition import Samples, read
from pdserve.proxy.upstream import LegFailure, Upstream

DEADLINE = 1.5
_LIMIT = 4 * 1024 * 1024
_COUNTED = (
    "stored_bytes_total", "loaded_bytes_total", "loaded_chunks_total", "lookup_chunks_total", "evictions_total",
    "digest_failures_total", "tier_failures_total", "tier_bytes_total", "tier_dropped_writes_total",
    "reserve_failures_total", "capacity_bytes", "engine_bytes_total",
)  # fmt: skip
_PEER_BYTES = "pdserve_peer_bytes_total"
_NAMES = frozenset((*(f"pdserve_cache_{name}" for name in _COUNTED), _PEER_BYTES))


class CacheView:
    """What is remembered of one daemon between two looks."""

    def __init__(self, name: str, url: str, key: str) -> None:
        self.name, self._upstream = name, Upstream(name, url)
        self._headers = [(b"authorization", b"Bearer " + key.encode())] if key else []
        self._status: dict[str, Any] = {}
        self._samples, self._before = Samples(), Samples()
        self._at = self._seconds = 0.0
        self._daemon = ""
        self.problem = "not asked yet"

    async def look(self, now: float) -> None:
        """Asks it. What cannot be had leaves the last answer, with its age and the reason."""
        try:
            async with asyncio.timeout(DEADLINE):
                status = msgspec.json.decode(await self._ask(b"/status"), type=dict[str, Any])
                samples = read(await self._ask(b"/metrics"), _NAMES)
        except (LegFailure, TimeoutError, msgspec.DecodeError) as exc:
            self.problem = str(exc) or f"no answer within {DEADLINE:g} s"
            return
        same = status.get("daemon_id") == self._daemon
        self._before, self._seconds = (self._samples, now - self._at) if same else (Samples(), 0.0)
        self._daemon = status.get("daemon_id", "")
        self._status, self._samples, self._at, self.problem = status, samples, now, ""

    async def _ask(self, path: bytes) -> bytes:
        async with self._upstream.request(b"GET", path, self._headers, b"", DEADLINE) as answer:
            raw = await answer.read(_LIMIT)
        if answer.status != 200:
            raise LegFailure(answer.status, f"{path.decode()} answered {answer.status}", self.name, "status")
        return raw

    async def close(self) -> None:
        await self._upstream.close()

    def total(self, name: str, **labels: str) -> float:
        return self._samples.total(f"pdserve_cache_{name}", **labels) or 0.0

    def new(self, name: str, label: str) -> dict[str, float]:
        """How much each label's counter has grown a second between the last two looks."""
        full = f"pdserve_cache_{name}"
        had = self._before.by(full, label) if self._seconds else None
        return rates(self._samples.by(full, label), had, self._seconds) if not self.problem else {}

    def a_second(self, name: str) -> float | None:
        full = f"pdserve_cache_{name}"
        return rate(self._samples.total(full), self._before.total(full), self._seconds) if not self.problem else None

    def shown(self, now: float) -> dict[str, Any]:
        status = self._status
        return {
            "name": self.name,
            "url": self._upstream.url,
            "state": "down" if self.problem else "up",
            "problem": self.problem or None,
            "age_s": round(now - self._at, 1) if self._at else None,
            "uptime_s": status.get("uptime_s"),
            "chunk_tokens": status.get("chunk_tokens"),
            "clients": [str(label) for label in status.get("clients", [])][:256],
            "leases": status.get("leases"),
            "reservations": status.get("reservations"),
            "stored_s": self.a_second("stored_bytes_total"),
            "loaded_s": self.a_second("loaded_bytes_total"),
            "hits": self.total("lookup_chunks_total", result="hit"),
            "misses": self.total("lookup_chunks_total", result="miss"),
            "digest_failures": self.total("digest_failures_total"),
            "transfer_failures": self.transfer_failures(),
            "tiers": self.tiers(),
            "peers": self._peers(),
            "engines": self._engines(),
        }

    def _engines(self) -> dict[str, dict[str, Any]]:
        """Bytes a second between each engine and this daemon: stored, and loaded by where they had been. Null until two
        looks have been taken."""
        full, found = "pdserve_cache_engine_bytes_total", dict[str, dict[str, Any]]()
        engines = {str(label).partition("/")[0].partition(" ")[0] for label in self._status.get("clients", [])}
        for name in sorted(engines | self._samples.by(full, "engine").keys()):
            had = {way: self._before.by(full, "tier", engine=name, direction=way) for way in ("stored", "loaded")}
            now = {way: self._samples.by(full, "tier", engine=name, direction=way) for way in had}
            if self.problem or not self._seconds:
                found[name] = {"stored_s": None, "loaded_s": None, "by_tier": {}}
                continue
            loaded = rates(now["loaded"], had["loaded"], self._seconds)
            stored = sum(rates(now["stored"], had["stored"], self._seconds).values())
            found[name] = {"stored_s": stored, "loaded_s": sum(loaded.values()), "by_tier": loaded}
        return found

    def _peers(self) -> list[dict[str, Any]]:
        """The daemons of other hosts, as this one sees them."""
        listed = (self._status.get("peers") or {}).get("peers") or ()
        return [
            {
                "name": str(peer.get("name")),
                "state": str(peer.get("state")),
                "problem": str(peer.get("error") or "") or None,
                "chunks": peer.get("chunks"),
                "in_s": self._exchanged(str(peer.get("name")), "in"),
                "out_s": self._exchanged(str(peer.get("name")), "out"),
            }
            for peer in listed
        ]

    def _exchanged(self, peer: str, way: str) -> float | None:
        now, before = (x.total(_PEER_BYTES, peer=peer, direction=way) for x in (self._samples, self._before))
        return rate(now, before, self._seconds)

    def transfer_failures(self) -> float:
        """Operations of lower tiers that did not succeed; a chunk that is gone is no failure."""
        return self.total("tier_failures_total") - self.total("tier_failures_total", reason="gone")

    def tiers(self) -> list[dict[str, Any]]:
        """Fast to slow."""
        status = self._status
        if not status:
            return []
        dram = {key: status.get(key) for key in ("chunks", "used_bytes", "capacity_bytes")}
        found = [self._tier("dram", dram | {"state": "ok"})]
        return found + [self._tier(name, facts) for name, facts in status.get("tiers", {}).items()]

    def _tier(self, name: str, facts: dict[str, Any]) -> dict[str, Any]:
        moved = {way: rate(*self._moved(name, way), self._seconds) for way in ("up", "down")} if name != "dram" else {}
        return {
            "name": name,
            "state": str(facts.get("state", "")),
            "circuit": facts.get("circuit"),
            "used": facts.get("used_bytes"),
            "capacity": facts.get("capacity_bytes"),
            "chunks": facts.get("chunks"),
            "queue": (facts.get("queued_up") or 0) + (facts.get("queued_down") or 0),
            "evictions": self.total("evictions_total", tier=name),
            "evictions_s": self.new("evictions_total", "tier").get(name),
            "loaded_s": self.new("loaded_bytes_total", "tier").get(name),
            "up_s": moved.get("up"),
            "down_s": moved.get("down"),
        }

    def _moved(self, tier: str, way: str) -> tuple[float | None, float | None]:
        now, before = (
            x.total("pdserve_cache_tier_bytes_total", tier=tier, direction=way) for x in (self._samples, self._before)
        )
        return now, before

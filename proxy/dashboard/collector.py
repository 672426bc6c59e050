"""Looks at everything in turn and writes it on the board: one picture a second while somebody watches, else one in ten.

One loop a proxy, whatever the number of its workers. It measures nothing itself: engines' pages are those that the fleet
has read anyway, the proxy's figures are those of its own /metrics, daemons are asked with a deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec

from pdserve import log
from pdserve.proxy.dashboard.board import Board
from pdserve.proxy.dashboard.caches import CacheView
from pdserve.proxy.dashboard.engines import Engine
from pdserve.proxy.dashboard.figures import Recent, rate, rates
from pdserve.proxy.dashboard.supervised import Supervised
from pdserve.proxy.exposition import Samples, read
from pdserve.proxy.fleet import Fleet
from pdserve.proxy.upstream import LegFailure

WATCHED_EVERY, ALONE_EVERY, SAMPLE_EVERY = 1.0, 10.0, 2.0
_TICK = 0.25  # how soon a new watcher is noticed
_VERSION_LIMIT = 64 * 1024
_OWN = frozenset(
    f"pdserve_{name}"
    for name in (
        "requests_total", "requests_running", "request_aborted_total", "requests_refused_total", "admission_limit",
        "admission_waiting", "split_decisions_total", "takeovers_total", "leg_failures_total",
        "slo_total", "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
    )
)  # fmt: skip
_LATENCIES = {"ttft": "pdserve_time_to_first_token_seconds_bucket", "itl": "pdserve_inter_token_latency_seconds_bucket"}
_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
_log = log.get("proxy.dashboard")


class _Version(msgspec.Struct):
    version: str = ""


class Collector:
    def __init__(
        self,
        fleet: Fleet,
        caches: list[CacheView],
        own: Callable[[], bytes],
        board: Board,
        supervised: Supervised,
        about: dict[str, Any],
    ) -> None:
        """`own` gives this proxy's /metrics; `about` is what never changes: its version, its target."""
        self._fleet, self._caches, self._own, self._board = fleet, caches, own, board
        self._supervised, self._about = supervised, about
        self._engines: dict[str, Engine] = {}
        self._before, self._before_at = Samples(), 0.0
        self._recent = {name: Recent() for name in _LATENCIES}
        self._sampled = self._asked = 0.0
        self._failures: dict[str, float] | None = None

    async def run(self) -> None:
        """Until it is cancelled."""
        last = 0.0
        while True:
            every = WATCHED_EVERY if self._board.watched() else ALONE_EVERY
            if time.monotonic() - last >= every and self._board.leads():
                last = time.monotonic()
                try:
                    await self.look(time.time())
                except Exception:  # noqa: BLE001 - a bug met by one look must not freeze the page for good
                    _log.exception("the dashboard could not be brought up to date")
            await asyncio.sleep(_TICK)

    async def look(self, now: float) -> None:
        if now - self._asked >= SAMPLE_EVERY - _TICK:
            self._asked = now
            await asyncio.gather(*(cache.look(now) for cache in self._caches))
        self._supervised.look()
        await self._look_at_engines(now)
        own = read(await asyncio.to_thread(self._own), _OWN)
        picture: dict[str, Any] = {
            **self._about,
            "at": now,
            "deployment": self._supervised.deployment,
            "engines": [engine.shown(self._process(name)) for name, engine in self._engines.items()],
            "caches": [cache.shown(now) for cache in self._caches],
            "totals": self._totals(own),
        }
        sample = self._sample(own, now) if now - self._sampled >= SAMPLE_EVERY - _TICK else None
        if sample is not None:
            self._sampled = now
            picture["sample"] = sample
        self._board.publish(msgspec.json.encode(picture), msgspec.json.encode(sample) if sample else b"")

    def _process(self, name: str) -> Any:
        return self._supervised.processes.get(name)

    async def _look_at_engines(self, now: float) -> None:
        there = {instance.name: instance for instance in self._fleet.instances}
        self._engines = {
            name: known if (known := self._engines.get(name)) and known.instance is instance else Engine(instance, now)
            for name, instance in there.items()
        }
        unknown = [engine for engine in self._engines.values() if engine.instance.up and not engine.asked]
        await asyncio.gather(*(self._ask_version(engine) for engine in unknown))
        for engine in self._engines.values():
            engine.look(now)

    async def _ask_version(self, engine: Engine) -> None:
        """Once each time that it comes up. An engine that does not tell stays without."""
        engine.asked = True
        upstream, within = engine.instance.upstream, self._fleet.deadlines.probe
        try:
            async with asyncio.timeout(within), upstream.request(b"GET", b"/version", (), b"", within) as answer:
                raw = await answer.read(_VERSION_LIMIT)
            if answer.status == 200:
                engine.version = msgspec.json.decode(raw, type=_Version).version[:64]
        except (LegFailure, TimeoutError, msgspec.DecodeError) as exc:
            _log.debug("%s does not tell its version: %s", engine.instance.name, exc)

    def _totals(self, own: Samples) -> dict[str, Any]:
        """Since the start, exactly as /metrics has them."""
        loads = [engine.totals() for engine in self._engines.values()]
        loaded: dict[str, float] = {}
        for load in loads:
            for tier, tokens in load["loaded"].items():
                loaded[tier] = loaded.get(tier, 0.0) + tokens
        return {
            "requests": own.by("pdserve_requests_total", "route"),
            "statuses": own.by("pdserve_requests_total", "status"),
            "running": own.total("pdserve_requests_running") or 0.0,
            "aborted": own.total("pdserve_request_aborted_total") or 0.0,
            "slo": own.by("pdserve_slo_total", "outcome"),
            "refused": own.by("pdserve_requests_refused_total", "reason"),
            "decisions": own.by("pdserve_split_decisions_total", "decision"),
            "takeovers": own.by("pdserve_takeovers_total", "how"),
            "leg_failures": own.by("pdserve_leg_failures_total", "reason"),
            "limit": own.total("pdserve_admission_limit") or 0.0,
            "waiting": own.total("pdserve_admission_waiting") or 0.0,
            "loaded_tokens": loaded,
            "load_s": _sum(load["load_s"] for load in loads),
            "saved_s": _sum(load["saved_s"] for load in loads),
            "digest_failures": sum(cache.total("digest_failures_total") for cache in self._caches),
            "transfer_failures": sum(cache.transfer_failures() for cache in self._caches),
        }

    def _sample(self, own: Samples, now: float) -> dict[str, float | None]:
        """One point of every line: short names, since there are 1800 of them."""
        seconds, before = now - self._before_at, self._before
        first = self._before_at == 0.0
        self._before, self._before_at = own, now
        totals = self._totals(own)
        engines, caches = list(self._engines.values()), self._caches
        found: dict[str, float | None] = {"t": round(now, 2)}
        for name, metric in _LATENCIES.items():
            self._recent[name].add(now, own.by(metric, "le"))
            found |= {f"{name}_{short}": self._recent[name].quantile(q) for short, q in _QUANTILES.items()}
        had = None if first else before.by("pdserve_requests_total", "route")
        found |= _named("req", rates(totals["requests"], had, seconds))
        takeovers = before.total("pdserve_takeovers_total") or 0.0
        found["req_recovered"] = None if first else rate(sum(totals["takeovers"].values()), takeovers, seconds)
        found |= {"running": totals["running"], "waiting": totals["waiting"], "limit": totals["limit"]}
        found["engine_waiting"] = sum(engine.waiting for engine in engines)
        found |= _named("hit", _added(engine.loaded for engine in engines if engine.instance.up))
        found["load"], found["saved"] = (
            _sum(getattr(engine, what) for engine in engines if engine.instance.up) for what in ("loading", "saved")
        )
        for cache in caches:
            for tier in cache.tiers() if not cache.problem else ():
                for what, key in (("used", "used"), ("cap", "capacity"), ("evict", "evictions_s")):
                    name = f"{what}_{tier['name']}"
                    found[name] = (found.get(name) or 0.0) + (tier[key] or 0.0)
        found["stored"], found["loaded"] = (
            _sum(cache.a_second(f"{what}_bytes_total") for cache in caches) for what in ("stored", "loaded")
        )
        found |= self._failed(totals)
        return {key: None if value is None else float(f"{value:.12g}") for key, value in found.items()}

    def _failed(self, totals: dict[str, Any]) -> dict[str, float]:
        """How many failures there were since the last sample: single ones are to be seen."""
        now = {
            "fail_legs": sum(totals["leg_failures"].values()),
            "fail_transfer": totals["transfer_failures"],
            "fail_digest": totals["digest_failures"],
        }
        before, self._failures = self._failures or now, now
        return {key: max(0.0, value - before[key]) for key, value in now.items()}


def _named(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{key}": value for key, value in values.items()}


def _added(many: Any) -> dict[str, float]:
    sums: dict[str, float] = {}
    for one in many:
        for key, value in one.items():
            sums[key] = sums.get(key, 0.0) + value
    return sums


def _sum(values: Any) -> float | None:
    """Of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None

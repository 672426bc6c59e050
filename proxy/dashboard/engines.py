"""An engine as the page shows it: what the fleet knows, what its /metrics said, what the launcher says of its process."""

from __future__ import annotations

from typing import Any

from pdserve.proxy.dashboard.figures import rate, rates
from pdserve.proxy.dashboard.supervised import Process
from pdserve.proxy.exposition import Samples, read
from pdserve.proxy.instance import Instance

_RUNNING, _WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
_KV = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_BORN = "process_start_time_seconds"
_PROMPT, _OUTPUT = "vllm:prompt_tokens_total", "vllm:generation_tokens_total"
_LOADED, _LOADING, _SAVED = (
    f"pdserve_engine_{what}_total" for what in ("loaded_tokens", "load_seconds", "saved_seconds")
)
_NAMES = frozenset((_RUNNING, _WAITING, *_KV, _BORN, _PROMPT, _OUTPUT, _LOADED, _LOADING, _SAVED))


class Engine:
    """What is remembered of one between two looks."""

    def __init__(self, instance: Instance, now: float) -> None:
        self.instance = instance
        self.version = ""
        self.asked = False  # for its version, since it came up
        self._state, self._since = instance.state, now
        self._born: float | None = None
        self._came_back = 0
        self._page = b""
        self._at = now
        self._samples = Samples()
        self._rates: dict[str, Any] = {}
        self._loaded_before: dict[str, float] = {}
        self._seconds_before = dict.fromkeys((_LOADING, _SAVED), 0.0)
        self.loaded: dict[str, float] = {}  # tokens a second, by tier
        self.loading: float | None = None  # seconds of loading a second
        self.saved: float | None = None

    def look(self, now: float) -> None:
        """Takes in what the fleet has learnt since the last look."""
        state = self.instance.state
        if state != self._state:
            self._state, self._since = state, now
            if state == "down":
                self.version, self.asked = "", False
        page = self.instance.exposed
        if page is self._page or not page:
            return
        before, self._samples = self._samples, read(page, _NAMES)
        seconds, self._at, self._page = now - self._at, now, page
        born = self._samples.total(_BORN)
        if born is not None and self._born is not None and born != self._born:
            self._came_back += 1
            self._keep(before)
            before = Samples()
        self._born = born if born is not None else self._born
        self._measure(before, seconds)

    def _measure(self, before: Samples, seconds: float) -> None:
        def a_second(name: str) -> float | None:
            return rate(self._samples.total(name), before.total(name), seconds)

        self._rates = {"prompt_s": a_second(_PROMPT), "output_s": a_second(_OUTPUT)}
        had = before.by(_LOADED, "tier") if before.total(_OUTPUT) is not None else None
        self.loaded = rates(self._samples.by(_LOADED, "tier"), had, seconds)
        self.loading, self.saved = a_second(_LOADING), a_second(_SAVED)

    def _keep(self, ended: Samples) -> None:
        """The counts of a process that is gone: what it saved stays saved."""
        for tier, tokens in ended.by(_LOADED, "tier").items():
            self._loaded_before[tier] = self._loaded_before.get(tier, 0.0) + tokens
        for name in (_LOADING, _SAVED):
            self._seconds_before[name] += ended.total(name) or 0.0

    def totals(self) -> dict[str, Any]:
        """Of the engine and of its earlier lives that were seen: tokens loaded by tier, seconds it took and saved."""
        loaded = dict(self._loaded_before)
        for tier, tokens in self._samples.by(_LOADED, "tier").items():
            loaded[tier] = loaded.get(tier, 0.0) + tokens
        load, saved = (
            None if (now := self._samples.total(name)) is None else now + self._seconds_before[name]
            for name in (_LOADING, _SAVED)
        )
        return {"loaded": loaded, "load_s": load, "saved_s": saved}

    @property
    def waiting(self) -> float:
        return self._samples.total(_WAITING) or 0.0 if self.instance.up else 0.0

    def shown(self, process: Process | None) -> dict[str, Any]:
        instance, up = self.instance, self.instance.up
        kv = next((usage for name in _KV if (usage := self._samples.total(name)) is not None), None)
        return {
            "name": instance.name,
            "role": instance.role,
            "url": instance.upstream.url,
            "state": instance.state,
            "since": self._since,
            "in_flight": instance.in_flight + instance.shared.others(instance.name),
            "running": self._samples.total(_RUNNING) if up else None,
            "waiting": self._samples.total(_WAITING) if up else None,
            "kv_used": kv if up else None,
            "version": self.version or None,
            "models": sorted(instance.models),
            "restarts": process.restarts if process else self._came_back,
            "restarts_by": "launcher" if process else "seen",
            "process": {"state": process.state, "detail": process.detail} if process else None,
            "loaded_s": sum(self.loaded.values()) if up else None,
            **(self._rates if up else dict.fromkeys(self._rates)),
        }

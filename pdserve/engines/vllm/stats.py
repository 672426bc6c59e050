"""What the connector tells vLLM's /metrics: decisions, loads, and the fits that the decisions rest on.

The scheduler's half counts; vLLM carries the counts to its API process once a step, where they become series with the
prefix `pdserve_engine_`.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Sequence
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from pdserve.engines.vllm.breakeven import BreakEven, Choice
from pdserve.metrics.engine import ENGINE, LOADING


class EngineStats:
    """Counts since the last take()."""

    def __init__(self, breakeven: BreakEven) -> None:
        self._breakeven = breakeven
        self.token_bytes = 0.0  # of KV, all shards
        self._decisions: Tally[str] = Tally()
        self._tokens: Tally[str] = Tally()
        self._load_seconds = self._saved_seconds = 0.0

    def decided(self, choice: Choice) -> None:
        self._decisions[choice.reason] += 1

    def loaded(self, tiers: Sequence[str], tokens: int, seconds: float | None) -> None:
        """`tiers`: where each chunk came from; the tokens are shared out among them evenly. No `seconds`: they say nothing of
        what the load took."""
        for tier, count in Tally(tiers or ["dram"]).items():
            self._tokens[tier] += round(tokens * count / max(1, len(tiers)))
        if seconds is None:
            return
        self._load_seconds += seconds
        self._saved_seconds += max(0.0, self._breakeven.saved(tokens, seconds) or 0.0)

    def take(self) -> Stats | None:
        if not self._decisions and not self._tokens:
            return None
        fits = {}
        for name, line in (
            ("prefill", self._breakeven.computing),
            ("dram", self._breakeven.loading),
            ("lower", self._breakeven.fetching),
        ):
            if line.seen:
                fits[name] = line.fit()
        data = {
            "decisions": dict(self._decisions),
            "tokens": dict(self._tokens),
            "load_seconds": self._load_seconds,
            "saved_seconds": self._saved_seconds,
            "fits": fits,
            "token_bytes": self.token_bytes,
        }
        self._decisions, self._tokens = Tally(), Tally()
        self._load_seconds = self._saved_seconds = 0.0
        return Stats(data=data)


class Stats(KVConnectorStats):
    """What take() gave, on its way; vLLM sends `data`."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        if not self.data or not other.data:
            self.data = self.data or other.data
            return self
        for name in ("decisions", "tokens"):
            self.data[name] = dict(Tally(self.data[name]) + Tally(other.data[name]))
        for name in ("load_seconds", "saved_seconds"):
            self.data[name] += other.data[name]
        self.data |= {name: other.data[name] for name in ("fits", "token_bytes")}
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's periodic log line."""
        if not self.data:
            return {}
        return {
            "tokens loaded": sum(self.data["tokens"].values()),
            "seconds loading": round(self.data["load_seconds"], 3),
            "seconds of computing saved": round(self.data["saved_seconds"], 3),
        }


class PromStats(KVConnectorPromMetrics):
    """The series, in vLLM's API process."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        kinds = {Counter: self._counter_cls, Gauge: self._gauge_cls}
        self._series = {
            name: kinds[m.kind](name=f"pdserve_{name}", documentation=m.help, labelnames=[*labelnames, *m.labels])
            for name, m in ENGINE.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        data, engine = transfer_stats_data, self.per_engine_labelvalues[engine_idx]
        if not data:
            return

        def of(name: str, *labels: object) -> Any:
            return self._series[name].labels(*engine, *labels)

        for reason, count in data["decisions"].items():
            decision = "load" if reason in LOADING else "compute"
            of("engine_load_decisions_total", decision, reason).inc(count)
        for tier, tokens in data["tokens"].items():
            of("engine_loaded_tokens_total", tier).inc(tokens)
        of("engine_load_seconds_total").inc(data["load_seconds"])
        of("engine_saved_seconds_total").inc(data["saved_seconds"])
        for name, (base, slope) in data["fits"].items():
            per_second = 1 / slope if slope else 0.0
            if name == "prefill":
                of("engine_prefill_base_seconds").set(base)
                of("engine_prefill_tokens_per_second").set(per_second)
            else:
                of("engine_load_base_seconds", name).set(base)
                of("engine_load_bytes_per_second", name).set(per_second * data["token_bytes"])

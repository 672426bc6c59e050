"""What the connector inside an engine counts: shown at the engine's own /metrics, with vLLM's labels before these."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from pdserve.metrics.metric import Metric

ENGINE = {
    "engine_load_decisions_total": Metric(
        Counter,
        "Hits in the cache by what was done (load, compute) and why: faster, slower (predicted from what both took of "
        "late), unmeasured (loaded until both are known), probe (loaded to see whether it still is slower), always "
        "(as configured), short (so few that they are computed without asking), handover (a producer computed it for this "
        "request), failed; and requests of which it is not known whether they hit: never (as "
        "configured), unavailable (the daemon did not answer in time)",
        ("decision", "reason"),
        unit="decisions",
        act="Many `slower`: loading does not pay at these lengths; look at `engine_load_bytes_per_second`. Any `failed`: "
        "the engine's log says why. `unavailable`: the daemon is down, or short of processor time (`cache.patience`).",
    ),
    "engine_loaded_tokens_total": Metric(
        Counter,
        "Tokens loaded instead of computed, by the tier that had them",
        ("tier",),
        unit="tokens",
        act="Stands still under load: nothing is reused; `pdserve explain` says why for one request.",
    ),
    "engine_load_seconds_total": Metric(
        Counter, "Time that requests waited for their loads", unit="seconds", act="Compare with `engine_saved_seconds_total`."
    ),
    "engine_saved_seconds_total": Metric(
        Counter,
        "Time that computing the loaded tokens would have taken, by the measured prefill speed, less the time of loading",
        unit="seconds",
        act="Grows slower than `engine_load_seconds_total`: the cache hardly pays here.",
    ),
    "engine_prefill_tokens_per_second": Metric(
        Gauge,
        "Prompt tokens computed a second of late (slope of the fit)",
        unit="tokens/s",
        act="Falls: the engine is shared by more requests, or is slower than it was.",
    ),
    "engine_prefill_base_seconds": Metric(
        Gauge, "What a prefill takes besides its tokens (base of the fit)", unit="seconds", act="Grows with queueing."
    ),
    "engine_load_bytes_per_second": Metric(
        Gauge,
        "KV bytes loaded a second of late, by way: dram (arena to the engine's blocks), lower (lower tiers to the arena)",
        ("tier",),
        unit="bytes/s",
        act="`dram` falls: the bus is busy. `lower` falls: the disk or the remote store is slow.",
    ),
    "engine_load_base_seconds": Metric(
        Gauge, "What a load takes besides its bytes", ("tier",), unit="seconds", act="Grows with the length of a step."
    ),
}  # fmt: skip
#: reasons of `engine_load_decisions_total` that go with `load`
LOADING = frozenset(("faster", "unmeasured", "probe", "always", "handover"))

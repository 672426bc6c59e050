"""Every metric's name, type, labels and meaning, in one table. Prometheus format, prefix `pdserve_`.

Labels stay bounded: instance names, tiers, routes and reasons come from closed sets, never from a request.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# vLLM's own buckets for the same quantities, so that one dashboard reads both.
TTFT_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
ITL_BUCKETS = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
E2E_BUCKETS = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
    1920.0,
    7680.0,
)
OP_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

# From a page of a fast disk to a large chunk of a slow server.
TIER_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metric(NamedTuple):
    kind: type[Counter] | type[Gauge] | type[Histogram]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


PROXY = {
    "requests_total": Metric(
        Counter,
        "Requests answered, by endpoint, route (pd, local, passthrough) and HTTP status",
        ("endpoint", "route", "status"),
    ),
    "requests_running": Metric(Gauge, "Requests being served now", ("endpoint",)),
    "request_aborted_total": Metric(Counter, "Requests whose client left before the end", ("endpoint",)),
    "time_to_first_token_seconds": Metric(
        Histogram, "Request arrival to first streamed event", ("route",), TTFT_BUCKETS
    ),
    "inter_token_latency_seconds": Metric(
        Histogram, "Time between two streamed events of one request", ("route",), ITL_BUCKETS
    ),
    "e2e_request_latency_seconds": Metric(Histogram, "Request arrival to last byte", ("route",), E2E_BUCKETS),
    "prefill_leg_seconds": Metric(Histogram, "Time of the prefill leg on the producer", ("instance",), TTFT_BUCKETS),
    "leg_failures_total": Metric(
        Counter, "Failed legs by instance and reason (connect, timeout, status, broken, diverged)", ("instance", "leg", "reason")
    ),
    "requests_refused_total": Metric(
        Counter,
        "Requests refused with 429, by reason (too_many_streams, rate_limit_exceeded, slo_cannot_be_met, engine)",
        ("reason",),
    ),
    "admission_limit": Metric(Gauge, "Requests that may be between arrival and first token at once"),
    "admission_waiting": Metric(Gauge, "Requests that wait for their turn"),
    "split_decisions_total": Metric(
        Counter,
        "Completions by what was decided at first: pd, or why a consumer alone was asked (no-producer, short-prompt, "
        "mostly-cached, producers-busy, several-prompts, prompt-logprobs, prompt-embeds, beam-search, no-tokens)",
        ("decision",),
    ),
    "takeovers_total": Metric(
        Counter, "Streams whose engine died, by how they went on (resume, repeat, end, none)", ("how",)
    ),
    "instance_up": Metric(Gauge, "1 while the instance answers its health probe", ("instance", "role")),
}

CACHE = {
    "cache_lookups_total": Metric(Counter, "Lookups answered"),
    "cache_lookup_chunks_total": Metric(
        Counter, "Chunks asked for, by result (hit, miss); not those of a client that asks again", ("result",)
    ),
    "cache_stored_chunks_total": Metric(Counter, "Chunks committed"),
    "cache_stored_bytes_total": Metric(Counter, "Bytes of committed chunks"),
    "cache_loaded_chunks_total": Metric(Counter, "Chunks that a client reported loaded, by tier", ("tier",)),
    "cache_loaded_bytes_total": Metric(Counter, "Bytes of chunks that a client reported loaded, by tier", ("tier",)),
    "cache_digest_failures_total": Metric(
        Counter, "Chunks dropped because their bytes did not match their digest", ("tier",)
    ),
    "cache_evictions_total": Metric(
        Counter, "Chunks removed, by reason (capacity, dropped, cleared, corrupt)", ("tier", "reason")
    ),
    "cache_reserve_failures_total": Metric(
        Counter, "Reservations refused, by reason (full, exists, too_large)", ("reason",)
    ),
    "cache_expired_total": Metric(
        Counter, "Leases and reservations taken back, by kind and reason (timeout, client_gone)", ("kind", "reason")
    ),
    "cache_tier_chunks_total": Metric(
        Counter, "Chunks moved between DRAM and a lower tier, by direction (up, down)", ("tier", "direction")
    ),
    "cache_tier_bytes_total": Metric(
        Counter, "Bytes moved between DRAM and a lower tier, by direction (up, down)", ("tier", "direction")
    ),
    "cache_tier_seconds": Metric(
        Histogram, "Time of one operation of a lower tier (get, put, contains)", ("tier", "op"), TIER_BUCKETS
    ),
    "cache_tier_failures_total": Metric(
        Counter,
        "Operations of a lower tier that did not succeed, by reason (error, late, gone, corrupt, refused, no_room)",
        ("tier", "op", "reason"),
    ),
    "cache_tier_dropped_writes_total": Metric(
        Counter, "Chunks not written down because the queue to the tier was full", ("tier",)
    ),
    "cache_tier_queue": Metric(Gauge, "Chunks waiting or moving, by direction (up, down)", ("tier", "direction")),
    "cache_tier_up": Metric(Gauge, "1 while the tier says that it is well", ("tier",)),
    "cache_recovered_chunks_total": Metric(
        Counter, "Chunks of an earlier daemon found in the arena, by result (kept, dropped)", ("result",)
    ),
    "cache_scrubbed_chunks_total": Metric(Counter, "Chunks whose digests were verified in the background", ("tier",)),
    "cache_scrubbed_bytes_total": Metric(Counter, "Bytes that were verified in the background", ("tier",)),
    "cache_pinned_bytes": Metric(Gauge, "Bytes that pins keep from being evicted"),
    "cache_capacity_bytes": Metric(Gauge, "Size of the tier", ("tier",)),
    "cache_used_bytes": Metric(Gauge, "Bytes in use in the tier, reservations included", ("tier",)),
    "cache_chunks": Metric(Gauge, "Chunks that can be hit", ("tier",)),
    "cache_leases": Metric(Gauge, "Chunk leases held by clients"),
    "cache_reservations": Metric(Gauge, "Reservations being written"),
    "cache_clients": Metric(Gauge, "Connected clients"),
    "cache_op_seconds": Metric(Histogram, "Time to answer one request inside the daemon", ("op",), OP_BUCKETS),
}

_PREFIX = "pdserve_"


def build(table: dict[str, Metric], registry: CollectorRegistry) -> dict[str, Any]:
    """Makes the table's metrics in `registry` and returns them by short name."""
    made: dict[str, Any] = {}
    for name, m in table.items():
        if m.kind is Histogram:
            made[name] = Histogram(_PREFIX + name, m.help, m.labels, registry=registry, buckets=m.buckets)
        elif m.kind is Gauge:  # the mode counts only where several worker processes are shown as one
            mode: Literal["livemax", "livesum"] = "livemax" if name.endswith("_up") else "livesum"
            made[name] = Gauge(_PREFIX + name, m.help, m.labels, registry=registry, multiprocess_mode=mode)
        else:
            made[name] = m.kind(_PREFIX + name, m.help, m.labels, registry=registry)
    return made

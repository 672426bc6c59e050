"""Every metric's name, type, unit, labels, meaning and what to do when it moves, in one table. Prometheus format,
prefix `pdserve_`; docs/metrics.md is made from it (scripts/metrics_doc.py).

Labels stay bounded: instance names, tiers, routes and reasons come from closed sets, never from a request.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# fmt: off
# vLLM's own buckets for the same quantities, so that one dashboard reads both.
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)
ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
E2E_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0,
    7680.0,
)
# fmt: on
OP_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

# From a page of a fast disk to a large chunk of a slow server.
TIER_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metric(NamedTuple):
    """`unit` and `act` (what to do when it moves) are for people: docs/metrics.md shows them, a test wants them."""

    kind: type[Counter] | type[Gauge] | type[Histogram]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    unit: str = ""
    act: str = ""


PROXY = {
    "requests_total": Metric(
        Counter,
        "Requests answered, by endpoint, route (pd, local, passthrough) and HTTP status",
        ("endpoint", "route", "status"),
        unit="requests",
        act="4xx: look at the clients; 5xx: `leg_failures_total` says which engine and why. Many `local` where "
        "you expect `pd`: see `split_decisions_total`.",
    ),
    "requests_running": Metric(
        Gauge,
        "Requests being served now",
        ("endpoint",),
        unit="requests",
        act="Grows without falling: engines are too slow for what arrives, or clients do not read. Add "
        "consumers, or set `slo_ttft`.",
    ),
    "request_aborted_total": Metric(
        Counter,
        "Requests whose client left before the end",
        ("endpoint",),
        unit="requests",
        act="Clients give up: compare with the time to first token; a timeout of theirs may be shorter than it.",
    ),
    "time_to_first_token_seconds": Metric(
        Histogram,
        "Request arrival to first streamed event",
        ("route",),
        TTFT_BUCKETS,
        unit="seconds",
        act="Up: look at `admission_waiting`, `prefill_leg_seconds` and the engines' waiting requests, in this "
        "order. Add producers, or let the cache grow.",
    ),
    "inter_token_latency_seconds": Metric(
        Histogram,
        "Time between two streamed events of one request",
        ("route",),
        ITL_BUCKETS,
        unit="seconds",
        act="Up: consumers are crowded or prefill for themselves (route `local`). Add consumers, raise `pd_max_queue`.",
    ),
    "e2e_request_latency_seconds": Metric(
        Histogram,
        "Request arrival to last byte",
        ("route",),
        E2E_BUCKETS,
        unit="seconds",
        act="Follows from the two above and the length of the answers.",
    ),
    "prefill_leg_seconds": Metric(
        Histogram,
        "Time of the prefill leg on the producer",
        ("instance",),
        TTFT_BUCKETS,
        unit="seconds",
        act="One producer above the others: it is crowded or ill. All: prompts grew, or hits became fewer.",
    ),
    "leg_failures_total": Metric(
        Counter,
        "Failed legs by instance and reason (connect, timeout, status, broken, diverged)",
        ("instance", "leg", "reason"),
        unit="failed legs",
        act="connect: the engine is down; timeout: it hangs or is overloaded; status: read its log; broken: it "
        "died in mid-answer; diverged: two engines answer differently, check that they run the same.",
    ),
    "requests_refused_total": Metric(
        Counter,
        "Requests refused with 429, by reason (too_many_streams, rate_limit_exceeded, slo_cannot_be_met, engine)",
        ("reason",),
        unit="requests",
        act="slo_cannot_be_met: more load than the target allows, add engines; rate_limit_exceeded and "
        "too_many_streams: a key's own limits; engine: an engine said 429.",
    ),
    "slo_total": Metric(
        Counter,
        "Targets of requests' classes by outcome (met, missed; refused for the first token only)",
        ("class", "target", "outcome"),
        unit="requests",
        act="missed: the class gets less than was promised, add engines or move others to a later class; refused: the "
        "same, told to the clients at once.",
    ),
    "prefix_pins_total": Metric(
        Counter,
        "Prefixes that cache_control markers asked to keep, by outcome (pinned, short, refused, failed)",
        ("outcome",),
        unit="prefixes",
        act="refused: the tenant's quota of pinned memory is full; failed: no daemon given by --cache knew the request, "
        "or its chunks did not arrive; short: less than one chunk before the marker, nothing to do.",
    ),
    "admission_limit": Metric(
        Gauge,
        "Requests that may be between arrival and first token at once",
        unit="requests",
        act="Falls: first tokens came too late for the target. It rises by itself when they are in time.",
    ),
    "admission_streams_limit": Metric(
        Gauge,
        "Requests that may run at once under a target for the time between tokens; 4096 as long as none was missed",
        unit="requests",
        act="Falls: engines decode more slowly than the target with this many streams; add consumers.",
    ),
    "admission_waiting": Metric(
        Gauge,
        "Requests that wait for their turn",
        unit="requests",
        act="Stays above zero: there is more load than the target allows.",
    ),
    "location_heard_timestamp_seconds": Metric(
        Gauge,
        "When (unix time) a cache daemon was last heard of what it holds, by which requests are routed; of the worker that has "
        "heard nothing for longest",
        ("cache",),
        unit="seconds",
        act="time() minus this is how old the knowledge may be. A daemon says something every 5 s: above 15 it is down or "
        "cannot be reached, above 20 it counts as empty.",
    ),
    "location_resyncs_total": Metric(
        Counter,
        "Times that a cache daemon told all that it holds, instead of what had changed",
        ("cache",),
        unit="times",
        act="One for each connection to a new life of a daemon. Many: the proxy falls behind what it is told.",
    ),
    "split_decisions_total": Metric(
        Counter,
        "Completions by what was decided at first: pd, or why a consumer alone was asked (no-producer, "
        "short-prompt, mostly-cached, producers-busy, quicker-local, measuring, several-prompts, prompt-logprobs, "
        "prompt-embeds, beam-search, no-tokens)",
        ("decision",),
        unit="requests",
        act="Much that is not `pd`: the label says why. no-producer: bring producers back; producers-busy: add some.",
    ),
    "takeovers_total": Metric(
        Counter,
        "Streams whose engine died, by how they went on (resume, repeat, end, none)",
        ("how",),
        unit="streams",
        act="Any: a consumer died or broke off in mid-answer; its log and `leg_failures_total` say why. none: a "
        "client saw the end of its stream.",
    ),
    "first_tokens_total": Metric(
        Counter,
        "Streams that began with their producer's own first token (--early-token), by what the consumer said to it: confirmed, "
        "differed (asked anew behind it), unanswered (it died, or the client left), ended (the answer was that token)",
        ("outcome",),
        unit="streams",
        act="differed: expected with sampling, once each for what chance decides; with temperature 0 only between tokens as good "
        "as each other. Many: producers and consumers may not serve the same weights.",
    ),
    "instance_up": Metric(
        Gauge,
        "1 while the instance answers its health probe",
        ("instance", "role"),
        unit="0 or 1",
        act="0: the engine does not answer /health. `pdserve status` and its log say why.",
    ),
}

CACHE = {
    "cache_lookups_total": Metric(
        Counter,
        "Lookups answered",
        unit="lookups",
        act="Stands still while prompts come: no engine is connected (`cache_clients`).",
    ),
    "cache_lookup_chunks_total": Metric(
        Counter,
        "Chunks asked for, by result (hit, miss); not those of a client that asks again",
        ("result",),
        unit="chunks",
        act="Share of hits falls: look at evictions (too small), at salts and models (never shared), at the prompts.",
    ),
    "cache_stored_chunks_total": Metric(
        Counter,
        "Chunks committed",
        unit="chunks",
        act="Stands still while prompts come: see `cache_reserve_failures_total`.",
    ),
    "cache_stored_bytes_total": Metric(
        Counter,
        "Bytes of committed chunks",
        unit="bytes",
        act="Its rate is what producers write into memory.",
    ),
    "cache_stored_tokens_total": Metric(
        Counter,
        "Tokens of committed chunks",
        unit="tokens",
        act="Against the prompt tokens that were computed: how much of them is kept.",
    ),
    "cache_loaded_chunks_total": Metric(
        Counter,
        "Chunks that a client reported loaded, by tier",
        ("tier",),
        unit="chunks",
        act="By tier: much from disk or remote means that memory is too small for what is used again.",
    ),
    "cache_loaded_bytes_total": Metric(
        Counter,
        "Bytes of chunks that a client reported loaded, by tier",
        ("tier",),
        unit="bytes",
        act="Its rate is what consumers read.",
    ),
    "cache_loaded_tokens_total": Metric(
        Counter,
        "Tokens of chunks that a client reported loaded, by tier",
        ("tier",),
        unit="tokens",
        act="What was not computed again, by where it came from.",
    ),
    "cache_engine_bytes_total": Metric(
        Counter,
        "Bytes that an engine stored (into dram), or reported loaded, by where they had been",
        ("engine", "direction", "tier"),
        unit="bytes",
        act="Its rate is the load on one link; one engine far below its equals: it computes what the others load.",
    ),
    "cache_digest_failures_total": Metric(
        Counter,
        "Chunks dropped because their bytes did not match their digest",
        ("tier",),
        unit="chunks",
        act="Any: memory, disk or network changed bytes. The tokens were computed again, nobody got a wrong "
        "answer. In dram: suspect the host's memory; below: the device or server of that tier.",
    ),
    "cache_evictions_total": Metric(
        Counter,
        "Chunks removed, by reason (capacity, dropped, cleared, corrupt)",
        ("tier", "reason"),
        unit="chunks",
        act="capacity: normal when full; fast and with few hits, the tier is too small. corrupt: see "
        "`cache_digest_failures_total`.",
    ),
    "cache_reserve_failures_total": Metric(
        Counter,
        "Reservations refused, by reason (full, exists, too_large)",
        ("reason",),
        unit="reservations",
        act="full: everything is leased or being written, make memory larger; exists is normal (somebody stored "
        "it first); too_large: the arena is smaller than a chunk.",
    ),
    "cache_expired_total": Metric(
        Counter,
        "Leases and reservations taken back, by kind and reason (timeout, client_gone)",
        ("kind", "reason"),
        unit="leases and reservations",
        act="client_gone: an engine died; timeout: an engine was stuck in a copy. Both are cleaned up by themselves.",
    ),
    "cache_tier_chunks_total": Metric(
        Counter,
        "Chunks moved between DRAM and a lower tier, by direction (up, down)",
        ("tier", "direction"),
        unit="chunks",
        act="down without up: written and never read again; a smaller tier or `selective` writes would do.",
    ),
    "cache_tier_bytes_total": Metric(
        Counter,
        "Bytes moved between DRAM and a lower tier, by direction (up, down)",
        ("tier", "direction"),
        unit="bytes",
        act="Its rate against what the device can do.",
    ),
    "cache_tier_tokens_total": Metric(
        Counter,
        "Tokens of chunks moved between DRAM and a lower tier, by direction (up, down)",
        ("tier", "direction"),
        unit="tokens",
        act="Up: what the tier has saved engines from computing.",
    ),
    "cache_tier_seconds": Metric(
        Histogram,
        "Time of one operation of a lower tier (get, put, contains)",
        ("tier", "op"),
        TIER_BUCKETS,
        unit="seconds",
        act="get up: the tier is slow or crowded; above the time to compute, it does harm: make it smaller or "
        "leave it out.",
    ),
    "cache_tier_failures_total": Metric(
        Counter,
        "Operations of a lower tier that did not succeed, by reason (error, late, gone, corrupt, refused, no_room)",
        ("tier", "op", "reason"),
        unit="operations",
        act="error and late: server or disk, its log; no_room: free disk space; refused: the server is full; "
        "corrupt: see `cache_digest_failures_total`; gone is normal.",
    ),
    "cache_tier_dropped_writes_total": Metric(
        Counter,
        "Chunks not written down because the queue to the tier was full",
        ("tier",),
        unit="chunks",
        act="Goes up: the tier is slower than what is stored; nothing is lost but later hits.",
    ),
    "cache_tier_queue": Metric(
        Gauge,
        "Chunks waiting or moving, by direction (up, down)",
        ("tier", "direction"),
        unit="chunks",
        act="Stays high: the tier is too slow for what is asked of it.",
    ),
    "cache_tier_up": Metric(
        Gauge,
        "1 while the tier says that it is well",
        ("tier",),
        unit="0 or 1",
        act="0: the tier says that it is not well; /status of the daemon says why. Requests go on without it.",
    ),
    "cache_recovered_chunks_total": Metric(
        Counter,
        "Chunks of an earlier daemon found in the arena, by result (kept, dropped)",
        ("result",),
        unit="chunks",
        act="After a crash only. dropped: being written when the daemon died, or damaged.",
    ),
    "cache_scrubbed_chunks_total": Metric(
        Counter,
        "Chunks whose digests were verified in the background",
        ("tier",),
        unit="chunks",
        act="Stands still: nothing to verify, or the scrubber's rate is 0.",
    ),
    "cache_scrubbed_bytes_total": Metric(
        Counter,
        "Bytes that were verified in the background",
        ("tier",),
        unit="bytes",
        act="Its rate is bounded by `--scrub-rate`.",
    ),
    "cache_scrub_progress": Metric(
        Gauge,
        "Share of the running verification pass that is done; 1 when none runs",
        unit="0 to 1",
        act="Stays below 1 for long: `--scrub-rate` is low for what there is.",
    ),
    "cache_pinned_bytes": Metric(
        Gauge,
        "Bytes that pins keep from being evicted",
        unit="bytes",
        act="Near the capacity: pins keep everything else out.",
    ),
    "cache_capacity_bytes": Metric(
        Gauge,
        "Size of the tier",
        ("tier",),
        unit="bytes",
        act="Set by the topology; 0 where the tier does not know.",
    ),
    "cache_used_bytes": Metric(
        Gauge,
        "Bytes in use in the tier, reservations included",
        ("tier",),
        unit="bytes",
        act="At its capacity is normal for a cache. Above it: report a bug.",
    ),
    "cache_chunks": Metric(
        Gauge,
        "Chunks that can be hit",
        ("tier",),
        unit="chunks",
        act="Falls at once: it was cleared, or the daemon was restarted without its arena.",
    ),
    "cache_leases": Metric(
        Gauge,
        "Chunk leases held by clients",
        unit="leases",
        act="Grows without falling: an engine hangs while it loads. They end after 30 s by themselves.",
    ),
    "cache_reservations": Metric(
        Gauge,
        "Reservations being written",
        unit="reservations",
        act="Grows without falling: an engine hangs while it stores.",
    ),
    "cache_clients": Metric(
        Gauge,
        "Connected clients",
        unit="connections",
        act="Fewer than engines: one is not connected; it works without cache and tries again.",
    ),
    "cache_op_seconds": Metric(
        Histogram,
        "Time to answer one request inside the daemon; a long one counts once for each of its parts",
        ("op",),
        OP_BUCKETS,
        unit="seconds",
        act="Up: the daemon has too little processor time; give it a core of its own.",
    ),
}

# What the connector inside an engine counts: shown at the engine's own /metrics, with vLLM's labels before these.
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

#: the cache daemon of a deployment with several hosts; `peer` is a host's name in the topology
PEERS = {
    "peer_up": Metric(
        Gauge, "1 while the peer answers", ("peer",), unit="0 or 1",
        act="0: `pdserve status` says why; requests go on without what that host holds.",
    ),
    "peer_failures_total": Metric(
        Counter, "Calls to the peer that failed or were not answered in time", ("peer",), unit="calls",
        act="Grows steadily: the host, its daemon or the network between is not well; see the daemon's log.",
    ),
    "peer_chunks_total": Metric(
        Counter,
        "Chunks exchanged with the peer, by direction (in, out) and result (arrived, refused, cancelled, corrupt, late, lost, "
        "failed, dropped)",
        ("peer", "direction", "result"), unit="chunks",
        act="`refused` is common (the other has it already); `dropped` and `late` mean that the network is slower than the prefill.",
    ),
    "peer_bytes_total": Metric(
        Counter, "Bytes of chunks exchanged with the peer, by direction (in, out)", ("peer", "direction"), unit="bytes",
        act="Its rate near the link's: prefill/decode across hosts is bound by the network.",
    ),
    "peer_speed_bytes": Metric(
        Gauge, "Bytes per second that the peer is expected to send from there (dram, disk), from what it sent lately",
        ("peer", "tier"), unit="bytes/s",
        act="Low: fetching from that peer stops being worth it (peer_pull_decisions_total, too_slow).",
    ),
    "peer_directory_keys": Metric(
        Gauge, "Chunks that the peer is known to hold in that tier (dram, disk)", ("peer", "tier"), unit="chunks",
        act="0 while the peer is up and busy: its events do not arrive.",
    ),
    "peer_resyncs_total": Metric(
        Counter, "Times that everything was asked of the peer anew, after a gap or its restart", ("peer",), unit="times",
        act="Grows without restarts: more changes there than can be told in time.",
    ),
    "peer_pull_decisions_total": Metric(
        Counter,
        "Runs of chunks that peers held, by decision (pull, too_slow), and chunks asked for that did not come (missing, failed, late)",
        ("decision",), unit="runs or chunks",
        act="Mostly too_slow: computing is faster here than the network; nothing is wrong.",
    ),
}

PREFIX = "pdserve_"
TABLES = (PROXY, CACHE, ENGINE, PEERS)


def build(table: dict[str, Metric], registry: CollectorRegistry) -> dict[str, Any]:
    """Makes the table's metrics in `registry` and returns them by short name."""
    made: dict[str, Any] = {}
    for name, m in table.items():
        if m.kind is Histogram:
            made[name] = Histogram(PREFIX + name, m.help, m.labels, registry=registry, buckets=m.buckets)
        elif m.kind is Gauge:  # the mode counts only where several worker processes are shown as one
            mode: Literal["livemax", "livemin", "livesum"] = "livemax" if name.endswith("_up") else "livesum"
            mode = "livemin" if name.endswith("_timestamp_seconds") else mode
            made[name] = Gauge(PREFIX + name, m.help, m.labels, registry=registry, multiprocess_mode=mode)
        else:
            made[name] = m.kind(PREFIX + name, m.help, m.labels, registry=registry)
    return made

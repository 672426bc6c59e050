"""What a cache daemon counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from pdserve.metrics.metric import Metric

OP_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
# From a page of a fast disk to a large chunk of a slow server.
TIER_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

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

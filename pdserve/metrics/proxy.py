"""What the proxy counts."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from pdserve.metrics.metric import Metric

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

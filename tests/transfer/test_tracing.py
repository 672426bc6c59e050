from __future__ import annotations

from typing import Any

from otlp import Receiver

from pdserve import trace
from pdserve.chunk import KeyChain
from pdserve.transfer import telling
from pdserve.transfer.gone import Gone
from pdserve.transfer.requests import Requests
from pdserve.transfer.tracing import Spans

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def leg(request: str, traceparent: str, **changes: Any) -> telling.Leg:
    keys = KeyChain(b"r" * 32, 64).full(list(range(128)))
    told: dict[str, Any] = {
        "leg": f"cmpl-{request}-0-0123abcd", "traceparent": traceparent, "at": 1000.0, "tokens": 128, "chunk_tokens": 64,
        "base": b"b", "lora": "", "tag": b"", "keys": keys, "local": 0, "covered": 128, "first_chunk": 0,
        "tiers": ["dram", "disk"], "found": 2, "why": "",
    }  # fmt: skip
    return telling.Leg(**{**told, **changes})


def test_loads_stores_lookups_and_tier_reads_in_the_requests_trace() -> None:
    gone = Gone()
    requests = Requests(gone, lambda: [], 0.0)
    with Receiver() as receiver:
        tracing = trace.start("cache", receiver.url)
        assert tracing is not None
        spans = Spans(tracing, requests.arrivals)
        requests.on_told = spans.told
        told = leg("a", f"00-{TRACE}-{PARENT}-01")
        spans.looked_up(told.keys, 2, 999.9, 0.001)
        gone.arrived(told.keys[1], "disk", 0.05, 4096, 999.95)
        early = telling.Span(told.leg, "queue", 999.0, 900.0)
        load = telling.Span(told.leg, "load", 1000.0, 5.0, 8192, 128, "dram+disk")
        requests.take(telling.Facts([early]), "prefill-0")  # before it is known whose trace it is
        requests.take(telling.Facts([told, load, telling.Ended(told.leg, 3, "stop")]), "prefill-0")
        requests.take(telling.Facts([leg("b", ""), telling.Span("cmpl-b-0-0123abcd", "load", 1.0, 1.0)]), "prefill-0")
        not_sampled = leg("c", f"00-{'c' * 32}-{PARENT}-00")
        requests.take(telling.Facts([not_sampled]), "prefill-0")
        spans.stop()
        found = {span.name: span for span in receiver.spans}
        assert len(found) == len(receiver.spans) == 4
    assert found.keys() == {"engine queue", "cache lookup", "tier read", "kv load"}
    assert {(span.trace_id, span.parent_id, span.service) for span in found.values()} == {(TRACE, PARENT, "cache")}
    assert {span.attributes["pdserve.instance"] for span in found.values()} == {"prefill-0"}
    assert found["kv load"].attributes["pdserve.bytes"] == 8192
    assert round(found["kv load"].ended - found["kv load"].began, 6) == 0.005
    assert (found["cache lookup"].attributes["pdserve.found"], found["tier read"].attributes["pdserve.tier"]) == (
        2,
        "disk",
    )


def test_lookups_that_nobody_claims_are_forgotten() -> None:
    with Receiver() as receiver:
        tracing = trace.start("cache", receiver.url)
        assert tracing is not None
        spans = Spans(tracing, lambda _: [])
        for n in range(10_000):
            spans.looked_up([n.to_bytes(32, "big")], 1, 1.0, 0.1)
        assert len(spans._lookups) <= 4096
        spans.stop()

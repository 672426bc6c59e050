"""An engine's series go with it; another's and everybody's stay."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from pdserve.metrics.metric import build
from pdserve.metrics.proxy import PROXY
from pdserve.proxy import series


def test_what_is_forgotten_takes_no_room() -> None:
    registry = CollectorRegistry()
    made = build(PROXY, registry)
    for n in range(20):  # engines that come and go
        name = f"decode-{n}"
        made["instance_up"].labels(name, "decode").set(1)
        made["prefill_leg_seconds"].labels(name).observe(0.1)
        for reason in ("connect", "broken"):
            made["leg_failures_total"].labels(name, "decode", reason).inc()
        if n:
            series.forget(made, name)
    series.forget(made, "nobody")
    made["requests_total"].labels("/v1/completions", "pd", "200").inc()
    named = [s for family in registry.collect() for s in family.samples if "instance" in s.labels]
    assert {s.labels["instance"] for s in named} == {"decode-0"}
    assert registry.get_sample_value("pdserve_leg_failures_total", {"instance": "decode-0", "leg": "decode", "reason": "broken"}) == 1
    assert b'pdserve_requests_total{endpoint="/v1/completions",route="pd",status="200"} 1.0' in series.page(registry, [])
    assert b"decode-0" not in series.page(registry, [])
    assert b"decode-0" in series.page(registry, ["decode-0"])

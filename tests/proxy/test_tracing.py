from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from otlp import Received, Receiver

from pdserve import trace
from pdserve.engines.fake.server import Fault
from pdserve.errors import ConfigError

anyio = pytest.mark.anyio
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as made:
        yield made


def named(spans: list[Received], name: str) -> Received:
    return next(span for span in spans if span.name == name)


def sampled(traceparent: str) -> bool:
    return bool(int(traceparent[-2:], 16) & 1)


@anyio
async def test_one_trace_over_both_legs(rig: Any, receiver: Receiver) -> None:
    async with rig(otlp_endpoint=receiver.url, admin_token="boss") as r:
        await r.complete(stream=True, max_tokens=3)
        trace_id = r.app.state.history.records(1)[0]["trace_id"]
        legs = [engine.seen[-1].headers["traceparent"] for engine in (r.p, r.d)]
    spans = receiver.spans  # the end of the proxy has sent all of them
    assert {span.trace_id for span in spans} == {trace_id}
    root = named(spans, "POST /v1/completions")
    prefill, decode, first = (named(spans, name) for name in ("prefill leg", "decode leg", "first token"))
    assert root.parent_id == ""
    assert {span.parent_id for span in (prefill, decode, first)} == {root.span_id}
    assert [given[:-2] for given in legs] == [f"00-{trace_id}-{leg.span_id}-" for leg in (prefill, decode)]
    assert all(sampled(given) for given in legs)
    assert root.began <= prefill.began <= prefill.ended <= decode.began <= decode.ended <= root.ended + 1e-3
    assert (root.attributes["pdserve.route"], root.attributes["pdserve.decode"]) == ("pd", "decode-0")
    assert root.attributes["http.response.status_code"] == 200
    assert {span.service for span in spans} == {"proxy"}


@anyio
async def test_the_clients_trace_is_joined_and_its_decision_kept(rig: Any, receiver: Receiver) -> None:
    async with rig(otlp_endpoint=receiver.url) as r:
        await r.post("/v1/completions", {"model": "fake", "prompt": "a"}, traceparent=f"00-{TRACE}-{PARENT}-01")
        await r.post("/v1/completions", {"model": "fake", "prompt": "a"}, traceparent=f"00-{'a' * 32}-{PARENT}-00")
        assert r.d.seen[-1].headers["traceparent"].startswith(f"00-{'a' * 32}-")
        assert not sampled(r.d.seen[-1].headers["traceparent"])
    assert {span.trace_id for span in receiver.spans} == {TRACE}
    assert named(receiver.spans, "POST /v1/completions").parent_id == PARENT


@anyio
async def test_what_is_not_sampled_is_not_sent_and_engines_are_told(rig: Any, receiver: Receiver) -> None:
    async with rig(otlp_endpoint=receiver.url, trace_sample=0.0) as r:
        await r.complete()
        assert not sampled(r.d.seen[-1].headers["traceparent"])
    assert receiver.spans == []


@anyio
async def test_a_leg_that_failed_is_marked(rig: Any, receiver: Receiver) -> None:
    async with rig(producers=2, otlp_endpoint=receiver.url) as r:
        r.p.faults.append(Fault("status"))
        await r.complete()
        assert (await r.post("/v1/completions", {"model": "no", "prompt": "a"})).status == 404
    legs = [span for span in receiver.spans if span.name == "prefill leg"]
    assert sorted((span.attributes["pdserve.instance"], span.failed) for span in legs) == [
        ("prefill-0", True), ("prefill-1", False),
    ]  # fmt: skip
    roots = [span for span in receiver.spans if span.name.startswith("POST")]
    assert sorted((span.attributes["http.response.status_code"], span.failed) for span in roots) == [
        (200, False),
        (404, True),
    ]


@anyio
async def test_off_engines_get_what_the_client_sent(rig: Any) -> None:
    async with rig() as r:
        given = f"00-{TRACE}-{PARENT}-01"
        await r.post("/v1/completions", {"model": "fake", "prompt": "a"}, traceparent=given)
        assert r.d.seen[-1].headers["traceparent"] == given
        assert "traceparent" not in (await r.complete()).headers
        assert "traceparent" not in r.d.seen[-1].headers
        assert r.app.state.history._tracing is None


def test_off_nothing_is_imported() -> None:
    code = (
        "import sys; from pdserve.proxy import app, options; app.build(options.parse(['--decode', 'http://h:1'])); "
        "print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("given", "environment", "found"),
    [
        ("http://h:4318", {}, "http://h:4318/v1/traces"),
        ("http://h:4318/v1/traces", {}, "http://h:4318/v1/traces"),
        ("http://h/x/", {}, "http://h/x/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://e:4318"}, "http://e:4318/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://e:1/own", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, "http://e:1/own"),
        (None, {}, ""),
    ],
)  # fmt: skip
def test_where_spans_go(
    given: str | None, environment: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert trace.endpoint(given) == found


def test_nonsense_is_refused() -> None:
    with pytest.raises(ConfigError, match="no http:// address"):
        trace.endpoint("h:4318")
    with pytest.raises(ConfigError, match="not between 0 and 1"):
        trace.start("proxy", "http://h:1", 2.0)
    assert trace.start("proxy", None) is None

"""OpenTelemetry traces: spans made after the fact from what is known anyway, exported by OTLP over HTTP.

Off, nothing is imported and no object is made. On, one trace follows a request: the proxy begins it or joins the client's
(W3C traceparent), both legs carry it to the engines, which export their own spans; the connector tells the cache daemon of
its loads and stores, and the daemon exports those.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

from pdserve.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

#: at the end, for what has not been sent yet
FLUSH_MS = 3000
#: spans that wait to be sent; more are dropped
MOST_WAITING = 8192
_PATH = "/v1/traces"
Attributes = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "where to send traces, OTLP over HTTP, e.g. http://127.0.0.1:4318 (default: OTEL_EXPORTER_OTLP_ENDPOINT, else none)"
    parser.add_argument("--otlp-endpoint", metavar="URL", help=text)
    text = "share of requests that are traced, where the client does not say (default %(default)g)"
    parser.add_argument("--trace-sample", type=float, default=1.0, metavar="0..1", help=text)


def endpoint(given: str | None) -> str:
    """The address for spans, path included; "" where there is none. OTEL_ variables count as OpenTelemetry says."""
    if not given:
        given = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        if given:
            return given
        given = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not given:
        return ""
    if not given.startswith(("http://", "https://")):
        raise ConfigError("--otlp-endpoint", f"{given!r} is no http:// address", "Give it as http://127.0.0.1:4318.")
    return given if given.rstrip("/").endswith(_PATH) else given.rstrip("/") + _PATH


def start(instance: str, given: str | None, sample: float = 1.0) -> Tracing | None:
    """None when no endpoint is configured. Raises ConfigError when the packages for it are missing."""
    address = endpoint(given)
    if not address:
        return None
    if not 0 <= sample <= 1:
        raise ConfigError("--trace-sample", f"{sample:g} is not between 0 and 1")
    try:
        return Tracing(instance, address, sample)
    except ImportError as e:
        fix = "Install them: pip install 'pdserve[otel]'."
        raise ConfigError("--otlp-endpoint", f"traces need packages that are not installed ({e.name})", fix) from e


class Tracing:
    """One per process. `instance` is the service's name in traces, as engines have theirs."""

    def __init__(self, instance: str, address: str, sample: float) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": instance, "service.namespace": "pdserve"})
        self._provider: TracerProvider = TracerProvider(ParentBased(TraceIdRatioBased(sample)), resource)
        exporter = OTLPSpanExporter(endpoint=address, timeout=5)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=MOST_WAITING, schedule_delay_millis=500, max_export_batch_size=512)
        )
        self._tracer = self._provider.get_tracer("pdserve")
        self._propagator = TraceContextTextMapPropagator()

    def span(self, name: str, traceparent: str, began: float, kind: str = "internal") -> Span:
        """Begins a span at unix time `began`, within `traceparent` if that is one. Whether it is recorded is the parent's to
        say, else chance's."""
        from opentelemetry.trace import SpanKind

        context = self._propagator.extract({"traceparent": traceparent}) if traceparent else None
        return self._tracer.start_span(name, context, kind=SpanKind[kind.upper()], start_time=_ns(began))

    def below(self, parent: Span, name: str, began: float, kind: str = "internal") -> Span:
        from opentelemetry.trace import SpanKind, set_span_in_context

        return self._tracer.start_span(name, set_span_in_context(parent), kind=SpanKind[kind.upper()], start_time=_ns(began))

    def told(self, traceparent: str, name: str, began: float, ms: float, attributes: Attributes) -> None:
        """A span that is over already, within a trace that somebody else decided to record."""
        span = self.span(name, traceparent, began)
        span.set_attributes({key: value for key, value in attributes.items() if value not in (None, "")})
        span.end(_ns(began + ms / 1000))

    def stop(self) -> None:
        with contextlib.suppress(Exception):  # what was not sent by now is lost, and nobody is there to be told
            self._provider.force_flush(FLUSH_MS)
        self._provider.shutdown()


def traceparent(span: Span) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def trace_id(span: Span) -> str:
    return f"{span.get_span_context().trace_id:032x}"


def failed(span: Span, why: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, why))


def _ns(at: float) -> int:
    return int(at * 1e9)


def now(clock: float) -> float:
    """Unix time of a perf_counter reading."""
    return time.time() - time.perf_counter() + clock

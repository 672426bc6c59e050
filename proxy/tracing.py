"""The spans of one request as the proxy sees it: the request, its time in line, both legs, the first token.

Made only where tracing is on. The request's own span and those of its legs exist while they last, because engines hang
theirs below them; the rest is written at the end, from the times that the state machine kept.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from pdserve import trace
from pdserve.proxy import trail
from pdserve.proxy.lifetime import State

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from pdserve.proxy.exchange import Exchange

Headers = list[tuple[bytes, bytes]]


class Traced:
    """One request's."""

    def __init__(self, tracing: trace.Tracing, root: Span) -> None:
        self._tracing, self._root = tracing, root
        self._leg: tuple[str, Span] | None = None

    @property
    def trace_id(self) -> str:
        return trace.trace_id(self._root)

    def leg(self, kind: str, instance: str, at: float) -> None:
        self.leg_ended(at)
        span = self._tracing.below(self._root, f"{kind} leg", trace.now(at), "client")
        span.set_attribute("pdserve.instance", instance)
        self._leg = (instance, span)

    def leg_ended(self, at: float, why: str = "") -> None:
        if self._leg is None:
            return
        _, span = self._leg
        if why:
            trace.failed(span, why)
        span.end(int(trace.now(at) * 1e9))
        self._leg = None

    def headers(self, headers: Headers, instance: str) -> Headers:
        """With the traceparent for an engine: its spans belong below the leg on it."""
        span = self._leg[1] if self._leg is not None and self._leg[0] == instance else self._root
        kept = [pair for pair in headers if pair[0] != b"traceparent"]
        return [*kept, (b"traceparent", trace.traceparent(span).encode())]

    def end(self, exchange: Exchange) -> None:
        """Once, when the request is over."""
        times = exchange.client.lifetime.times
        over = times[-1][1]
        self.leg_ended(over)
        for (state, began), (_, ended) in itertools.pairwise(times):
            if state is State.QUEUED:
                self._below("queue", began, ended)
        first = trail.first_token(times)
        if first is not None:
            self._below("first token", exchange.client.arrived, first)
        told: dict[str, Any] = {
            "pdserve.request_id": exchange.request_id, "pdserve.route": exchange.route, "pdserve.prefill": exchange.prefill,
            "pdserve.decode": exchange.decode, "pdserve.reason": exchange.reason, "gen_ai.request.model": exchange.model,
            "http.response.status_code": exchange.client.status or None,
        }  # fmt: skip
        for key, value in told.items():
            if value:
                self._root.set_attribute(key, value)
        if exchange.client.lifetime.state is not State.DONE:
            trace.failed(self._root, exchange.error or exchange.client.lifetime.state.value)
        self._root.end(int(trace.now(over) * 1e9))

    def _below(self, name: str, began: float, ended: float) -> None:
        self._tracing.below(self._root, name, trace.now(began)).end(int(trace.now(ended) * 1e9))


def begin(tracing: trace.Tracing, exchange: Exchange, headers: Headers) -> None:
    """Gives the exchange its spans. If the request is not to be recorded they are empty, and say so to the engines."""
    given = next((value for name, value in headers if name == b"traceparent"), b"")
    at = trace.now(exchange.client.arrived)
    root = tracing.span(f"POST {exchange.endpoint}", given.decode("latin-1"), at, "server")
    traced = exchange.trail.traced = Traced(tracing, root)
    exchange.trace_id = traced.trace_id

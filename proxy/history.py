"""What became of the latest requests: one bounded ring of records. Endpoints begin and end entries; nobody else writes.

A record is plain numbers and short texts, never a prompt or an answer. Requests that run are kept by reference until
they end, so their number is bounded by the connections that the proxy accepts; ended ones by `capacity`, the oldest
going first, each of at most some kilobytes (every text in it has a limit).
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pdserve import trace
from pdserve.proxy import openai, tracing, trail
from pdserve.proxy.lifetime import State

if TYPE_CHECKING:
    from pdserve.proxy.exchange import Exchange

CAPACITY = 2000
_TEXT = 256  # characters kept of what a client gives: session, model
_ERROR = 500
_TRACEPARENT = re.compile(rb"^[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}$")
_STATES = {State.DONE: "done", State.FAILED: "failed", State.ABORTED: "cancelled"}
#: what engines tell, filled in when somebody looks (told.py); None until then, and for good where nobody told
TOLD = ("prompt_tokens", "cached_tokens", "output_tokens", "load_ms", "saved_ms", "finish_reason")
Record = dict[str, Any]


class History:
    """The one owner of all records of this process."""

    def __init__(self, capacity: int = CAPACITY, tracing: trace.Tracing | None = None) -> None:
        self._capacity, self._tracing = capacity, tracing
        self._running: dict[int, Exchange] = {}
        self._ended: OrderedDict[int, _Kept] = OrderedDict()
        self._next = 0
        self._clock = time.time() - time.perf_counter()

    def __len__(self) -> int:
        return len(self._running) + len(self._ended)

    def begin(self, exchange: Exchange, headers: list[tuple[bytes, bytes]] = []) -> None:  # noqa: B006 - read only
        """`headers` are the client's."""
        if exchange.endpoint not in openai.FETCHED:
            self._running[id(exchange)] = exchange
            if self._tracing is not None:
                tracing.begin(self._tracing, exchange, headers)

    def end(self, exchange: Exchange) -> None:
        """Once, when the request is over, whatever its end."""
        if self._running.pop(id(exchange), None) is None:
            return
        if exchange.trail.traced is not None:
            exchange.trail.traced.end(exchange)
        self._next += 1
        self._ended[self._next] = _Kept(exchange)
        if len(self._ended) > self._capacity:
            self._ended.popitem(last=False)

    def records(self, limit: int, state: str = "") -> list[Record]:
        """The newest first, without their spans."""
        found = []
        for kept in self._newest():
            if not state or kept.state == state:
                found.append(self._record(kept))
                if len(found) >= limit:
                    break
        return found

    def record(self, request_id: str) -> Record | None:
        """The newest of that id, with spans."""
        kept = next((kept for kept in self._newest() if kept.id == request_id), None)
        return None if kept is None else self._record(kept) | {"spans": kept.spans()}

    def fill(self, request_id: str, told: dict[str, Any]) -> None:
        """Keeps what engines have told of an ended request, so that it need not be asked for again."""
        for kept in reversed(self._ended.values()):
            if kept.id == request_id:
                kept.told |= {key: told[key] for key in TOLD if told.get(key) is not None and kept.told.get(key) is None}
                return

    def _newest(self) -> Iterator[_Kept]:
        yield from (_Kept(exchange) for exchange in reversed(list(self._running.values())))
        yield from reversed(self._ended.values())

    def _record(self, kept: _Kept) -> Record:
        return {**kept.record(), "received": round(self._clock + kept.arrived, 6)}


class _Kept:
    """What is kept of a request: little, and made into a record when somebody looks, which few ever do."""

    __slots__ = (
        "arrived", "decode", "endpoint", "error", "id", "legs", "model", "prefill", "reason", "route", "session", "state",
        "status", "tenant", "times", "told", "trace",
    )  # fmt: skip

    def __init__(self, exchange: Exchange) -> None:
        client, gone_over = exchange.client, exchange.trail
        self.id, self.endpoint, self.arrived = exchange.request_id, exchange.endpoint, client.arrived
        self.model, self.session = exchange.model[:_TEXT], exchange.facts.session[:_TEXT]
        self.tenant, self.route, self.reason = exchange.key.name, exchange.route, exchange.reason
        self.prefill, self.decode, self.error = exchange.prefill, exchange.decode, exchange.error[:_ERROR]
        self.times, self.legs, self.status = client.lifetime.times, gone_over.legs, client.status
        self.trace = exchange.trace_id or trace_id(exchange.headers)
        self.told: Record = _handed(gone_over.handed)
        self.state = _STATES.get(client.lifetime.state, "active")
        if self.state == "done":
            self.state = "failed" if client.status >= 400 else "recovered" if gone_over.recoveries else "done"

    def spans(self) -> list[trail.Span]:
        return trail.spans(self.arrived, self.times, self.legs, time.perf_counter())

    def record(self) -> Record:
        first = trail.first_token(self.times)
        end = time.perf_counter() if self.state == "active" else self.times[-1][1]
        return {
            "id": self.id,
            "endpoint": self.endpoint,
            "model": self.model or None,
            "session": self.session or None,
            "tenant": self.tenant,
            "route": self.route,
            "reason": self.reason or None,
            "prefill": self.prefill or None,
            "decode": self.decode or None,
            "state": self.state,
            "status": self.status or None,
            "error": self.error or None,
            "ttft_ms": None if first is None else round((first - self.arrived) * 1000, 3),
            "duration_ms": round((end - self.arrived) * 1000, 3),
            "trace_id": self.trace,
            "recoveries": sum(1 for leg in self.legs if leg.failure),
            **dict.fromkeys(TOLD),
            **self.told,
        }


def _handed(handed: dict[str, Any] | None) -> Record:
    """What the producer's reply has told already."""
    if handed is None:
        return {}
    cached = {tier: tokens for tier, tokens in handed["cached"].items() if tokens}
    return {"cached_tokens": cached, "load_ms": handed["load_ms"], "saved_ms": handed["saved_ms"]}


def trace_id(headers: list[tuple[bytes, bytes]]) -> str | None:
    """The W3C trace that the client says this request belongs to."""
    for name, value in headers:
        if name == b"traceparent" and (found := _TRACEPARENT.match(value)):
            return found[1].decode()
    return None

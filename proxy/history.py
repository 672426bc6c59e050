"""What became of the latest requests: one bounded ring of records. Endpoints begin and end entries; nobody else writes.

A record is plain numbers and short texts, never a prompt or an answer. Requests that run are kept by reference until
they end, so their number is bounded by the connections that the proxy accepts; ended ones by `capacity`, the oldest
going first, each of at most some kilobytes (every text in it has a limit).
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from pdserve import trace
from pdserve.proxy import openai, tracing, trail
from pdserve.proxy.lifetime import State

if TYPE_CHECKING:
    from pdserve.proxy.split import Exchange

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
        self._ended: OrderedDict[int, Record] = OrderedDict()
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
        self._ended[self._next] = self._record(exchange)
        while len(self._ended) > self._capacity:
            self._ended.popitem(last=False)

    def records(self, limit: int, state: str = "") -> list[Record]:
        """The newest first, without their spans."""
        found = []
        for record in self._newest():
            if not state or record["state"] == state:
                found.append({key: value for key, value in record.items() if key != "spans"})
                if len(found) >= limit:
                    break
        return found

    def record(self, request_id: str) -> Record | None:
        """The newest of that id, with spans."""
        return next((dict(record) for record in self._newest() if record["id"] == request_id), None)

    def fill(self, request_id: str, told: dict[str, Any]) -> None:
        """Keeps what engines have told of an ended request, so that it need not be asked for again."""
        for record in reversed(self._ended.values()):
            if record["id"] == request_id:
                record |= {key: value for key, value in told.items() if key in TOLD and record.get(key) is None}
                return

    def _newest(self) -> list[Record]:
        running = [self._record(exchange) for exchange in reversed(self._running.values())]
        return [*running, *reversed(self._ended.values())]

    def _record(self, exchange: Exchange) -> Record:
        client = exchange.client
        times, arrived, now = client.lifetime.times, client.arrived, time.perf_counter()
        state = _STATES.get(client.lifetime.state, "active")
        if state == "done":
            state = "failed" if client.status >= 400 else "recovered" if exchange.trail.recoveries else "done"
        first = trail.first_token(times)
        return {
            "id": exchange.request_id,
            "received": round(self._clock + arrived, 6),
            "endpoint": exchange.endpoint,
            "model": exchange.model[:_TEXT] or None,
            "session": exchange.facts.session[:_TEXT] or None,
            "tenant": exchange.key.name,
            "route": exchange.route,
            "reason": exchange.reason or None,
            "prefill": exchange.prefill or None,
            "decode": exchange.decode or None,
            "state": state,
            "status": client.status or None,
            "error": exchange.error[:_ERROR] or None,
            "ttft_ms": None if first is None else round((first - arrived) * 1000, 3),
            "duration_ms": round(((now if state == "active" else times[-1][1]) - arrived) * 1000, 3),
            "trace_id": exchange.trace_id or trace_id(exchange.headers),
            "recoveries": exchange.trail.recoveries,
            **dict.fromkeys(TOLD),
            **_handed(exchange.trail.handed),
            "spans": trail.spans(arrived, times, exchange.trail.legs, now),
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

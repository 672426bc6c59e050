"""One request, from its first byte to its one terminal state: receives the body, watches the client, answers errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

from pdserve import log
from pdserve.errors import RequestError, UpstreamError
from pdserve.proxy import openai, relay
from pdserve.proxy.admission import Admission
from pdserve.proxy.call import Call, ClientGone
from pdserve.proxy.exchange import Exchange
from pdserve.proxy.history import History
from pdserve.proxy.keys import Keys
from pdserve.proxy.lifetime import Event, Lifetime, State
from pdserve.proxy.options import Settings
from pdserve.proxy.pinning import Pinning
from pdserve.proxy.relay import Client, ClientStuck
from pdserve.proxy.split import Splitter

_CLIENT_LEFT = 499  # in metrics only: the client is not there to be told
_log = log.get("proxy")


@dataclass(frozen=True, slots=True)
class Doors:
    """What a request passes before it is worked on."""

    keys: Keys
    admission: Admission
    history: History
    pinning: Pinning


class Endpoint:
    """One path that engines answer: owns a request from its first byte to its one terminal state."""

    def __init__(self, path: str, splitter: Splitter, doors: Doors, settings: Settings, made: dict[str, Any]) -> None:
        self._path, self._splitter, self._doors, self._settings, self._metrics = path, splitter, doors, settings, made
        self._running = made["requests_running"].labels(path)
        self._labelled: dict[tuple[str, ...], Any] = {}

    async def __call__(self, call: Call) -> None:
        rid = openai.request_id(call.headers)
        client = Client(call, Lifetime(call.came), self._settings.deadlines)
        client.extra.append((b"x-request-id", rid.encode()))
        method = b"POST" if call.method == b"POST" else b"GET"  # for HEAD: it is the call that writes no body
        exchange = Exchange(method, self._path, call.target, [], rid, client)
        client.on_first = lambda seconds: self._first_token(exchange, seconds)
        self._running.inc()
        self._doors.history.begin(exchange, call.headers)
        try:
            await self._live(exchange, call)
        finally:
            # They hold the exchange, which holds the client: circles that only the collector would find.
            client.on_first = client.on_gap = None
            self._running.dec()
            self._count(exchange)
            self._doors.history.end(exchange)

    async def _live(self, exchange: Exchange, call: Call) -> None:
        """Runs the request to a terminal state; whatever ends it is answered here, in one place."""
        client = exchange.client
        try:
            key, headers = self._doors.keys.admit(call.headers)
            self._doors.keys.take(key)
            try:
                exchange.key, exchange.headers = key, openai.headers_in(headers, exchange.request_id)
                body = await call.body(self._settings.deadlines.receive)
                await self._told(exchange, self._serve(exchange, body))
            finally:
                self._doors.keys.give_back(key)
        except (ClientGone, ClientStuck) as left:
            if str(left):
                _log.warning("request %s: %s", exchange.request_id, left)
            if not client.lifetime.over:
                client.lifetime.on(Event.GONE)
        except RequestError as error:  # from the key or from reading the body
            await self._refused(exchange, error)
        except asyncio.CancelledError:
            if call.has_left():
                if not client.lifetime.over:
                    client.lifetime.on(Event.GONE)
                return
            # The server stops and has waited long enough. The legs are closed already; the client is told.
            if client.lifetime.over:
                raise
            await self._upstream_failed(exchange, UpstreamError(503, "The proxy is stopping."))

    async def _told(self, exchange: Exchange, work: Awaitable[None]) -> None:
        client = exchange.client
        try:
            await work
        except RequestError as error:
            await self._refused(exchange, error)
        except UpstreamError as error:
            await self._upstream_failed(exchange, error)
        except ClientStuck:
            raise
        except Exception:
            _log.exception("request %s: a bug in the proxy ended it", exchange.request_id)
            if client.started or client.lifetime.over:
                raise  # the server closes the connection, which is all that can still be said
            text = "The proxy failed on this request; its log says why."
            await self._fail(exchange, 500, openai.error_json(500, text, "internal_error"))

    async def _serve(self, exchange: Exchange, body: bytes) -> None:
        if self._path not in openai.SPLIT:
            return await self._splitter.pass_on(exchange, body)
        ask = openai.parse(body, self._splitter.models, self._path)
        exchange.model = ask.body.get("model") or ""
        if ask.body.raw is not body:
            exchange.marked = body
        given = openai.priority(ask.body)
        slo = self._doors.admission.classes.of(exchange.key, exchange.headers, given)
        if not slo.targets:
            return await self._splitter.generate(exchange, ask)
        exchange.client.lifetime.on(Event.QUEUE)
        async with self._doors.admission.entered(exchange.key, slo, len(body), given or 0) as leave:
            exchange.leave = leave
            await self._splitter.generate(exchange, ask)

    async def _refused(self, exchange: Exchange, error: RequestError) -> None:
        exchange.error = error.message
        if error.status == 429:
            self._metrics["requests_refused_total"].labels(error.code or "engine").inc()
        if exchange.client.started:  # nobody is left who could go on with the stream
            return await self._upstream_failed(exchange, UpstreamError(error.status, error.message))
        await self._fail(exchange, error.status, openai.request_error(error), getattr(error, "retry_after", 1))

    async def _upstream_failed(self, exchange: Exchange, error: UpstreamError) -> None:
        exchange.error = str(error)
        if exchange.client.started:
            exchange.client.lifetime.on(Event.ERROR)
            await relay.broken_off(exchange.client, exchange.endpoint, error)
        else:
            await self._fail(exchange, error.status, error.body or openai.error_json(error.status, str(error)))

    async def _fail(self, exchange: Exchange, status: int, body: bytes, retry_after: int = 1) -> None:
        client = exchange.client
        client.lifetime.on(Event.ERROR)
        headers = [(b"content-type", openai.JSON)]
        if status in (429, 503):
            headers.append((b"retry-after", str(retry_after).encode()))
        await client.whole(status, headers, openai.error_of(self._path, status, body))

    def _first_token(self, exchange: Exchange, seconds: float) -> None:
        if exchange.leave is not None:
            exchange.leave.first_token()
        self._observe("time_to_first_token_seconds", exchange.route, seconds)
        if exchange.marked:
            self._pin(exchange)
        observe = self._metric("inter_token_latency_seconds", exchange.route).observe
        exchange.client.on_gap = observe
        if (leave := exchange.leave) is not None and leave.slo.itl:

            def judged(gap: float) -> None:
                observe(gap)
                leave.gap(gap)

            def second(gap: float) -> None:  # the handover's, which says nothing of the pace of a consumer
                observe(gap)
                exchange.client.on_gap = judged

            exchange.client.on_gap = judged if exchange.first is None else second

    def _pin(self, exchange: Exchange) -> None:
        self._doors.pinning.begin(self._path, exchange.request_id, exchange.headers, exchange.marked)

    def _observe(self, metric: str, route: str, seconds: float) -> None:
        self._metric(metric, route).observe(seconds)

    def _metric(self, name: str, *labels: str) -> Any:
        """The metric with these labels; looked up in the library once, which takes a lock and its time."""
        key = (name, *labels)
        found = self._labelled.get(key)
        if found is None:
            found = self._labelled[key] = self._metrics[name].labels(*labels)
        return found

    def _count(self, exchange: Exchange) -> None:
        if self._doors.admission.gates:
            self._metrics["admission_limit"].set(self._doors.admission.first.most)
            self._metrics["admission_streams_limit"].set(self._doors.admission.running.most)
            self._metrics["admission_waiting"].set(self._doors.admission.waiting)
        client, route = exchange.client, exchange.route
        gone = client.lifetime.state is State.ABORTED
        if gone:
            self._metrics["request_aborted_total"].labels(self._path).inc()
        status = _CLIENT_LEFT if gone else client.status
        self._metric("requests_total", self._path, route, str(status)).inc()
        if client.lifetime.state is State.DONE:
            if exchange.marked:
                self._pin(exchange)
            self._observe("e2e_request_latency_seconds", route, time.perf_counter() - client.arrived)

"""One request, from its first byte to its one terminal state: receives the body, watches the client, answers errors."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from pdserve import log
from pdserve.errors import RequestError, UpstreamError
from pdserve.proxy import openai, relay
from pdserve.proxy.admission import Admission
from pdserve.proxy.keys import Keys
from pdserve.proxy.lifetime import Event, Lifetime, State
from pdserve.proxy.options import Settings
from pdserve.proxy.relay import Client, ClientStuck
from pdserve.proxy.split import Exchange, Splitter

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_CLIENT_LEFT = 499  # in metrics only: the client is not there to be told
_log = log.get("proxy")


class ClientGone(Exception):
    """The client closed its connection before its request was complete."""


@dataclass(frozen=True, slots=True)
class Doors:
    """What a request passes before it is worked on."""

    keys: Keys
    admission: Admission


class Endpoint:
    """One path that engines answer: owns a request from its first byte to its one terminal state."""

    def __init__(self, path: str, splitter: Splitter, doors: Doors, settings: Settings, made: dict[str, Any]) -> None:
        self._path, self._splitter, self._doors, self._settings, self._metrics = path, splitter, doors, settings, made

    async def __call__(self, scope: Scope, receive: Receive, send: relay.Send) -> None:
        rid = openai.request_id(scope["headers"])
        client = Client(send, Lifetime(), self._settings.deadlines)
        client.extra.append((b"x-request-id", rid.encode()))
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        path, method = scope["raw_path"].partition(b"?")[0] + query, b"GET" if self._path in openai.FETCHED else b"POST"
        exchange = Exchange(method, self._path, path, [], rid, client)
        client.on_first = lambda seconds: self._first_token(exchange, seconds)
        running = self._metrics["requests_running"].labels(self._path)
        running.inc()
        try:
            await self._live(exchange, scope, receive)
        finally:
            running.dec()
            self._count(exchange)

    async def _live(self, exchange: Exchange, scope: Scope, receive: Receive) -> None:
        """Runs the request to a terminal state; whatever ends it is answered here, in one place."""
        client = exchange.client
        try:
            key, headers = self._doors.keys.admit(scope["headers"])
            self._doors.keys.take(key)
            try:
                exchange.key, exchange.headers = key, openai.headers_in(headers, exchange.request_id)
                body = await read_body(scope, receive, self._settings)
                async with watching(receive, client):
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
        ask = openai.parse(body, self._splitter.models)
        if not self._doors.admission.gated(exchange.key):
            return await self._splitter.generate(exchange, ask)
        exchange.client.lifetime.on(Event.QUEUE)
        async with self._doors.admission.entered(exchange.key, openai.priority(ask.body)) as leave:
            exchange.leave = leave
            await self._splitter.generate(exchange, ask)

    async def _refused(self, exchange: Exchange, error: RequestError) -> None:
        if error.status == 429:
            self._metrics["requests_refused_total"].labels(error.code or "engine").inc()
        if exchange.client.started:  # nobody is left who could go on with the stream
            return await self._upstream_failed(exchange, UpstreamError(error.status, error.message))
        await self._fail(exchange, error.status, openai.request_error(error), getattr(error, "retry_after", 1))

    async def _upstream_failed(self, exchange: Exchange, error: UpstreamError) -> None:
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
        await client.whole(status, headers, body)

    def _first_token(self, exchange: Exchange, seconds: float) -> None:
        if exchange.leave is not None:
            exchange.leave.first_token()
        self._observe("time_to_first_token_seconds", exchange.route, seconds)
        exchange.client.on_gap = self._metrics["inter_token_latency_seconds"].labels(exchange.route).observe

    def _observe(self, metric: str, route: str, seconds: float) -> None:
        self._metrics[metric].labels(route).observe(seconds)

    def _count(self, exchange: Exchange) -> None:
        self._metrics["admission_limit"].set(self._doors.admission.limit)
        self._metrics["admission_waiting"].set(self._doors.admission.waiting)
        client, route = exchange.client, exchange.route
        gone = client.lifetime.state is State.ABORTED
        if gone:
            self._metrics["request_aborted_total"].labels(self._path).inc()
        status = _CLIENT_LEFT if gone else client.status
        self._metrics["requests_total"].labels(self._path, route, str(status)).inc()
        if client.lifetime.state is State.DONE:
            self._observe("e2e_request_latency_seconds", route, time.perf_counter() - client.arrived)


async def read_body(scope: Scope, receive: Receive, settings: Settings) -> bytes:
    """The whole body, within its limit and its deadline. Raises RequestError or ClientGone."""
    limit, parts, size = settings.max_body, [], 0
    try:
        async with asyncio.timeout(settings.deadlines.receive):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise RequestError(413, f"The request body is larger than {limit} bytes.", code="body_too_large")
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts) if len(parts) > 1 else parts[0]
    except TimeoutError as exc:
        text = f"The request body did not arrive within {settings.deadlines.receive:g} s."
        raise RequestError(408, text, "timeout_error") from exc


@contextlib.asynccontextmanager
async def watching(receive: Receive, client: Client) -> AsyncIterator[None]:
    """Cancels the block when the client leaves, and then raises ClientGone from it.

    The block runs in the caller's own task: cancelling that task is what closes both legs at once, wherever it waits.
    """
    task = asyncio.current_task()
    assert task is not None
    left = False

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    def gone(watch: asyncio.Task[None]) -> None:
        nonlocal left
        # The server says "disconnect" too when the response is complete; then there is nothing left to cancel.
        if not watch.cancelled() and not client.ended:
            left = True
            task.cancel()

    watch = asyncio.create_task(wait())
    watch.add_done_callback(gone)
    try:
        yield
    except asyncio.CancelledError:
        if left and task.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        watch.remove_done_callback(gone)
        watch.cancel()

"""The proxy's routes and its life: the table of contents.

    client -> Endpoint (receives the body, watches the client) -> openai.parse -> split -> upstream -> relay -> client

Endpoints that carry tokens are plain ASGI, mounted as they are, so that nothing sits between an engine's event and the
client; the small ones are FastAPI's. There is no middleware and no global: an app holds its own fleet and its own
metrics, and two of them live in one process without knowing of each other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.routing import Route

from pdserve import engines, log, metrics
from pdserve.errors import ConfigError, RequestError, UpstreamError
from pdserve.proxy import openai, options, relay
from pdserve.proxy.fleet import Fleet, Instance
from pdserve.proxy.lifetime import Deadlines, Event, Lifetime, State
from pdserve.proxy.options import Settings, add_arguments
from pdserve.proxy.policies import base as policies
from pdserve.proxy.relay import Client, ClientStuck
from pdserve.proxy.split import Exchange, Splitter
from pdserve.proxy.upstream import Upstream

__all__ = ["add_arguments", "build", "main"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_CLIENT_LEFT = 499  # in metrics only: the client is not there to be told
_log = log.get("proxy")


class ClientGone(Exception):
    """The client closed its connection before its request was complete."""


class Endpoint:
    """One path that engines answer: owns a request from its first byte to its one terminal state."""

    def __init__(self, path: str, splitter: Splitter, fleet: Fleet, settings: Settings, made: dict[str, Any]) -> None:
        self._path, self._splitter, self._fleet, self._settings, self._metrics = path, splitter, fleet, settings, made

    async def __call__(self, scope: Scope, receive: Receive, send: relay.Send) -> None:
        rid = openai.request_id(scope["headers"])
        client = Client(send, Lifetime(), self._settings.deadlines)
        client.extra.append((b"x-request-id", rid.encode()))
        query = b"?" + scope["query_string"] if scope["query_string"] else b""
        path, headers = scope["raw_path"].partition(b"?")[0] + query, openai.headers_in(scope["headers"], rid)
        exchange = Exchange(b"GET" if self._path in openai.FETCHED else b"POST", self._path, path, headers, rid, client)
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
            body = await read_body(scope, receive, self._settings)
            async with watching(receive, client):
                await self._told(exchange, self._serve(exchange, body))
        except (ClientGone, ClientStuck) as left:
            if str(left):
                _log.warning("request %s: %s", exchange.request_id, left)
            if not client.lifetime.over:
                client.lifetime.on(Event.GONE)
        except RequestError as error:  # from reading the body
            await self._fail(exchange, error.status, openai.request_error(error))
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
            await self._fail(exchange, error.status, openai.request_error(error))
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
        if self._path in openai.SPLIT:
            await self._splitter.generate(exchange, openai.parse(body, self._fleet.models))
        else:
            await self._splitter.pass_on(exchange, body)

    async def _upstream_failed(self, exchange: Exchange, error: UpstreamError) -> None:
        if exchange.client.started:
            exchange.client.lifetime.on(Event.ERROR)
            await relay.broken_off(exchange.client, exchange.endpoint, error)
        else:
            await self._fail(exchange, error.status, error.body or openai.error_json(error.status, str(error)))

    async def _fail(self, exchange: Exchange, status: int, body: bytes) -> None:
        client = exchange.client
        client.lifetime.on(Event.ERROR)
        headers = [(b"content-type", openai.JSON)]
        if status == 503:
            headers.append((b"retry-after", b"1"))
        await client.whole(status, headers, body)

    def _first_token(self, exchange: Exchange, seconds: float) -> None:
        self._observe("time_to_first_token_seconds", exchange.route, seconds)
        exchange.client.on_gap = self._metrics["inter_token_latency_seconds"].labels(exchange.route).observe

    def _observe(self, metric: str, route: str, seconds: float) -> None:
        self._metrics[metric].labels(route).observe(seconds)

    def _count(self, exchange: Exchange) -> None:
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


def build(settings: Settings) -> FastAPI:
    """The app. Its fleet, metrics registry and settings are at app.state."""
    registry = CollectorRegistry()
    made = metrics.build(metrics.PROXY, registry)
    instances = [Instance(name, role, Upstream(name, url)) for name, role, url in settings.instances]
    fleet = Fleet(instances, settings.deadlines, made, settings.models, settings.probe_every)
    dialect = engines.dialect(settings.engine)
    splitter = Splitter(fleet, dialect, lambda: policies.make(settings.policy), settings.deadlines)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await fleet.start()
        try:
            yield
        finally:
            await fleet.stop()

    app = FastAPI(title="pdserve proxy", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.fleet, app.state.registry, app.state.settings = fleet, registry, settings
    methods = dict.fromkeys((*openai.SPLIT, *openai.PASSED_ON), "POST") | dict.fromkeys(openai.FETCHED, "GET")
    for path, method in methods.items():
        app.router.routes.append(Route(path, Endpoint(path, splitter, fleet, settings, made), methods=[method]))
    _add_own_pages(app, fleet, registry, methods)
    return app


def _add_own_pages(app: FastAPI, fleet: Fleet, registry: CollectorRegistry, methods: dict[str, str]) -> None:
    async def health() -> Response:
        """200 while some engine can answer a completion."""
        return Response(status_code=200 if fleet.ready else 503)

    async def ping() -> Response:
        """200 while this process runs."""
        return Response(status_code=200)

    async def exposed() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def other(path: str, request: Request) -> Response:
        if method := methods.get(f"/{path}"):
            text = f"/{path} is asked with {method}, not {request.method}."
            body = openai.error_json(405, text, "MethodNotAllowed", code="method_not_allowed")
            return Response(body, 405, {"allow": method}, media_type="application/json")
        body = openai.error_json(404, f"There is no /{path} here.", "NotFoundError", code="not_found")
        return Response(body, 404, media_type="application/json")

    app.add_api_route("/health", health, methods=["GET", "HEAD"])
    app.add_api_route("/ping", ping, methods=["GET", "POST"])
    app.add_api_route("/metrics", exposed, methods=["GET"])
    app.add_api_route("/{path:path}", other, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])


def serve_config(app: FastAPI, deadlines: Deadlines) -> uvicorn.Config:
    return uvicorn.Config(
        app, loop="uvloop", http="httptools", ws="none", lifespan="on", log_config=None, access_log=False,
        server_header=False, timeout_keep_alive=75, timeout_graceful_shutdown=max(1, int(deadlines.shutdown)),
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Runs the proxy until it is asked to stop. 0 after an orderly end."""
    log.setup()
    settings = options.settings(args)
    app = build(settings)
    bound = _bind(args.host, args.port)
    with contextlib.closing(bound):
        names = ", ".join(name for name, _, _ in settings.instances)
        _log.info("listening on http://%s:%d for %s", args.host, bound.getsockname()[1], names)
        server = uvicorn.Server(serve_config(app, settings.deadlines))
        # uvicorn raises the signal that stopped it once more when it is done; met by these, an orderly stop exits with 0.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        server.run(sockets=[bound])
    return 0 if server.started else 1


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(2048)
    except OSError as exc:
        bound.close()
        problem = f"cannot listen on {host}:{port} ({exc.strerror})"
        raise ConfigError("--port", problem, "Choose another with --port.") from exc
    return bound

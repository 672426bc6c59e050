"""The proxy's routes and its life: the table of contents.

    client -> guard -> endpoint (keys, body, watches the client) -> admission -> openai.parse -> split -> relay -> client
                                                              routing -> policies    upstream -> engines

Endpoints that engines answer are called by the connection itself (guard.py, call.py), so that nothing sits between an
engine's event and the client; the proxy's own pages are FastAPI's. There is no middleware and
no global: an app holds its own fleet and its own metrics, and two of them live in one process without knowing of each
other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry

from pdserve import engines, log, trace
from pdserve.errors import ConfigError
from pdserve.metrics import metric
from pdserve.metrics.proxy import PROXY
from pdserve.proxy import keys, openai, options, series, workers
from pdserve.proxy.access import Access
from pdserve.proxy.admin import Admin
from pdserve.proxy.admin_requests import AdminRequests
from pdserve.proxy.admission import Admission
from pdserve.proxy.began import Began
from pdserve.proxy.dashboard.dashboard import Dashboard
from pdserve.proxy.endpoint import Doors, Endpoint
from pdserve.proxy.exposition import joined
from pdserve.proxy.fleet import Fleet
from pdserve.proxy.guard import Limits, guarded
from pdserve.proxy.history import History
from pdserve.proxy.instance import Instance
from pdserve.proxy.keys import Keys
from pdserve.proxy.legs import Legs
from pdserve.proxy.locating import Locating
from pdserve.proxy.options import Settings, add_arguments
from pdserve.proxy.pinning import Pinning
from pdserve.proxy.routing import Routing
from pdserve.proxy.shared import Alone, Shared, Together
from pdserve.proxy.siblings import Siblings
from pdserve.proxy.slo import Classes
from pdserve.proxy.split import Splitter
from pdserve.proxy.told import Caches
from pdserve.proxy.upstream import Upstream
from pdserve.proxy.worth import Worth

__all__ = ["add_arguments", "build", "main"]

_log = log.get("proxy")
# Requests leave no circles behind (tests/proxy/test_garbage.py): at Python's own 700 new objects the collector would look at
# the requests that run again and again, and find nothing. At 200,000 it looks at everything, as Python's own does at 70,000.
COLLECT = (20_000, 5, 2)


def build(settings: Settings, shared: Shared | None = None) -> FastAPI:
    """The app. Its fleet, metrics registry and settings are at app.state. `shared` is what it has with other workers."""
    shared = shared or Alone()
    registry = CollectorRegistry()
    made = metric.build(PROXY, registry)
    places = dict(settings.places)
    instances = [Instance(name, role, Upstream(name, url), places.get(name, "")) for name, role, url in settings.instances]
    fleet = Fleet(instances, settings.deadlines, made, settings.models, settings.probe_every, shared)
    dialect = engines.dialect(settings.engine)
    worth = Worth(settings.pd_min_tokens, settings.pd_max_queue, settings.pd_adaptive)
    routing = Routing(settings.prefill_policy, settings.decode_policy, worth)
    fleet.on_new_life = routing.forget
    locating = Locating(routing, settings.caches, settings.admin_token, made)
    began = Began(settings.caches, settings.admin_token)
    legs = Legs(fleet, dialect, routing, settings.deadlines, began)
    splitter = Splitter(legs, settings.early_decode, settings.early_token)
    admission = Admission(settings.classes, settings.max_waiting, counted=made["slo_total"])
    known = keys.read(settings.api_keys, settings.api_keys_env)
    _check_classes(known, settings.classes)
    known.shared = shared
    tracing = trace.start("proxy", settings.otlp_endpoint, settings.trace_sample) if settings.otlp_endpoint else None
    history = History(tracing=tracing)
    pinning = Pinning(fleet, settings.caches, settings.admin_token, made)
    doors = Doors(known, admission, history, pinning)
    siblings = Siblings(history, shared.folder, shared.row)
    caches = Caches(settings.caches, settings.admin_token)
    requests = AdminRequests(history, siblings, caches, Access(settings.admin_token))
    admin = Admin(fleet, settings.admin_token)
    dashboard = Dashboard(fleet, settings, lambda: series.page(registry, fleet.names), shared.folder)

    life = _life((fleet, dashboard, siblings, locating, began), (caches, pinning, admin), tracing)
    front: dict[tuple[bytes, bytes], Endpoint] = {}
    app = FastAPI(title="pdserve proxy", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.fleet, app.state.registry, app.state.settings = fleet, registry, settings
    methods = dict.fromkeys((*openai.SPLIT, *openai.PASSED_ON), "POST") | dict.fromkeys(openai.FETCHED, "GET")
    for path, method in methods.items():
        endpoint = Endpoint(path, splitter, doors, settings, made)
        for name in ("GET", "HEAD") if method == "GET" else (method,):
            front[name.encode(), path.encode()] = endpoint
    app.state.front, app.state.history, app.state.requests = front, history, requests
    app.state.dashboard, app.state.routing, app.state.admission = dashboard, routing, admission
    app.state.began = began
    admin.add_to(app)
    dashboard.add_to(app)
    requests.add_to(app)
    _add_own_pages(app, fleet, registry, methods)
    return app


class _Starts(Protocol):
    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class _Stops(Protocol):
    async def stop(self) -> None: ...


def _life(starting: Sequence[_Starts], others: Sequence[_Stops], tracing: trace.Tracing | None) -> Any:
    """What runs beside the requests: begun in order, stopped in the opposite one, the fleet, which all use, last."""

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        for part in starting:
            await part.start()
        try:
            yield
        finally:
            for one in (*others, *reversed(starting)):
                await one.stop()
            if tracing is not None:
                await asyncio.to_thread(tracing.stop)

    return life


def _check_classes(known: Keys, classes: Classes) -> None:
    for key in known.by_hash.values():
        if key.slo and key.slo not in classes.by_name:
            fix = f"Known: {', '.join(classes.by_name)}; --slo-class makes one."
            raise ConfigError(f"the class of key {key.name!r}", f"there is no class {key.slo!r}", fix)


def _add_own_pages(app: FastAPI, fleet: Fleet, registry: CollectorRegistry, methods: dict[str, str]) -> None:
    async def health() -> Response:
        """200 while some engine can answer a completion."""
        return Response(status_code=200 if fleet.ready else 503)

    async def ping() -> Response:
        """200 while this process runs."""
        return Response(status_code=200)

    async def own_metrics() -> Response:
        return Response(series.page(registry, fleet.names), media_type=CONTENT_TYPE_LATEST)

    async def engine_metrics() -> Response:
        """Every engine's own, as they were read last, with the engine's name as `instance`."""
        pages = [(instance.name, instance.exposed) for instance in fleet.instances]
        page = await asyncio.to_thread(joined, pages)  # of many engines it is a megabyte, and streams are waiting
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    async def other(path: str, request: Request) -> Response:
        if method := methods.get(f"/{path}"):
            text = f"/{path} is asked with {method}, not {request.method}."
            body = openai.error_json(405, text, "MethodNotAllowed", code="method_not_allowed")
            return Response(body, 405, {"allow": method}, media_type="application/json")
        body = openai.error_json(404, f"There is no /{path} here.", "NotFoundError", code="not_found")
        return Response(body, 404, media_type="application/json")

    app.add_api_route("/health", health, methods=["GET", "HEAD"])
    app.add_api_route("/ping", ping, methods=["GET", "POST"])
    app.add_api_route("/metrics", own_metrics, methods=["GET"])
    app.add_api_route("/metrics/engines", engine_metrics, methods=["GET"])
    app.add_api_route("/{path:path}", other, methods=["GET", "POST", "PUT", "PATCH", "DELETE"])


def serve_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    limits = Limits(settings.max_head, settings.deadlines.head, settings.max_connections, settings.max_body)
    protocol = guarded(limits, app.state.front)
    return uvicorn.Config(
        app, loop="uvloop", http=protocol, ws="none", lifespan="on", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, timeout_keep_alive=75, timeout_graceful_shutdown=max(1, int(settings.deadlines.shutdown)),
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Runs the proxy until it is asked to stop. 0 after an orderly end."""
    log.setup("proxy", form=args.log_format)
    settings = options.settings(args)
    role = workers.role()
    if role is None and settings.workers > 1:
        port = args.port

        def bind() -> socket.socket:
            nonlocal port
            bound = _bind(args.host, port, shared=True)
            port = bound.getsockname()[1]
            return bound

        deadlines = settings.deadlines
        return workers.Parent(settings.workers, bind, deadlines.shutdown, deadlines.drain).run()
    shared = Together(role.folder, role.row) if role else None
    app = build(settings, shared)
    with contextlib.closing(socket.socket(fileno=role.descriptor) if role else _bind(args.host, args.port)) as bound:
        names = ", ".join(name for name, _, _ in settings.instances)
        _log.info("listening on http://%s:%d for %s", args.host, bound.getsockname()[1], names)
        gc.collect()
        gc.freeze()  # what is there now stays: not to be walked again by each collection
        gc.set_threshold(*COLLECT)
        server = _Server(serve_config(app, settings), role, app.state.dashboard.feed.close)
        # uvicorn raises the signal that stopped it once more when it is done; met by these, an orderly stop exits with 0.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        if role:
            signal.signal(signal.SIGHUP, lambda *_: server.leave(settings.deadlines.drain))
        server.run(sockets=[bound])
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """Tells a parent, if there is one, when it serves; leaves without haste when it has been replaced."""

    def __init__(self, config: uvicorn.Config, role: workers.Role | None, leaving: Callable[[], None]) -> None:
        """`leaving` is called when it stops, before it waits for what still runs."""
        super().__init__(config)
        self._role, self._leaving = role, leaving

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._role is not None and self.started:
            self._role.tell_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._leaving()
        await super().shutdown(sockets)

    def leave(self, within: float) -> None:
        self.config.timeout_graceful_shutdown = max(1, int(within))
        self.should_exit = True


def _bind(host: str, port: int, shared: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, port))
        bound.listen(2048)
    except OSError as exc:
        bound.close()
        problem = f"cannot listen on {host}:{port} ({exc.strerror})"
        raise ConfigError("--port", problem, "Choose another with --port.") from exc
    return bound

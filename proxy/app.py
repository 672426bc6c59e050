"""The proxy's routes and its life: the table of contents.

    client -> guard -> endpoint (keys, body, watches the client) -> admission -> openai.parse -> split -> relay -> client
                                                              routing -> policies    upstream -> engines

Endpoints that carry tokens are plain ASGI, mounted as they are, so that nothing sits between an engine's event and the
client; the small ones are FastAPI's. There is no middleware and no global: an app holds its own fleet and its own
metrics, and two of them live in one process without knowing of each other.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
from collections.abc import AsyncIterator

import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.routing import Route

from pdserve import engines, log, metrics
from pdserve.errors import ConfigError
from pdserve.proxy import keys, openai, options
from pdserve.proxy.admin import Admin
from pdserve.proxy.admission import Admission
from pdserve.proxy.endpoint import Doors, Endpoint
from pdserve.proxy.fleet import Fleet
from pdserve.proxy.guard import guarded
from pdserve.proxy.instance import Instance
from pdserve.proxy.keys import Keys
from pdserve.proxy.options import Settings, add_arguments
from pdserve.proxy.routing import Routing
from pdserve.proxy.split import Splitter
from pdserve.proxy.upstream import Upstream
from pdserve.proxy.worth import Worth

__all__ = ["add_arguments", "build", "main"]

_log = log.get("proxy")


def build(settings: Settings) -> FastAPI:
    """The app. Its fleet, metrics registry and settings are at app.state."""
    registry = CollectorRegistry()
    made = metrics.build(metrics.PROXY, registry)
    instances = [Instance(name, role, Upstream(name, url)) for name, role, url in settings.instances]
    fleet = Fleet(instances, settings.deadlines, made, settings.models, settings.probe_every)
    dialect = engines.dialect(settings.engine)
    worth = Worth(settings.pd_min_tokens, settings.pd_max_queue)
    routing = Routing(settings.prefill_policy, settings.decode_policy, worth)
    splitter = Splitter(fleet, dialect, routing, settings.deadlines)
    admission = Admission(settings.slo_ttft, settings.max_waiting)
    made["admission_limit"].set_function(lambda: admission.limit)
    made["admission_waiting"].set_function(lambda: admission.waiting)
    doors = Doors(keys.read(settings.api_keys) if settings.api_keys else Keys(), admission)
    admin = Admin(fleet, settings.admin_token)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await fleet.start()
        try:
            yield
        finally:
            await admin.stop()
            await fleet.stop()

    app = FastAPI(title="pdserve proxy", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.fleet, app.state.registry, app.state.settings = fleet, registry, settings
    methods = dict.fromkeys((*openai.SPLIT, *openai.PASSED_ON), "POST") | dict.fromkeys(openai.FETCHED, "GET")
    for path, method in methods.items():
        app.router.routes.append(Route(path, Endpoint(path, splitter, doors, settings, made), methods=[method]))
    admin.add_to(app)
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


def serve_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    protocol = guarded(settings.max_head, settings.deadlines.head, settings.max_connections)
    return uvicorn.Config(
        app, loop="uvloop", http=protocol, ws="none", lifespan="on", log_config=None, access_log=False,
        server_header=False, timeout_keep_alive=75, timeout_graceful_shutdown=max(1, int(settings.deadlines.shutdown)),
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
        server = uvicorn.Server(serve_config(app, settings))
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

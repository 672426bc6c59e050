"""The daemon's HTTP side: health, status, metrics; what is in the cache, and what a person may do with it."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field

from pdserve.chunk import KEY_BYTES, tenant_tag

if TYPE_CHECKING:
    from pdserve.transfer.daemon import Daemon

#: how long DELETE waits for the lower tiers
DELETE_S = 10.0
Hex = Annotated[str, Field(pattern=f"^[0-9a-f]{{{2 * KEY_BYTES}}}$")]
Keys = Annotated[list[Hex], Field(max_length=65536)]


class KeysBody(BaseModel):
    keys: Keys


class PinBody(BaseModel):
    """Keys; or a request that engines told of, and how many of its prompt's tokens: the whole chunks within them."""

    keys: Keys = []
    request: Annotated[str, Field(max_length=800)] = ""
    tokens: Annotated[int, Field(ge=0)] = 0
    ttl_s: Annotated[float, Field(gt=0, le=24 * 3600)] = 300.0


class RequestsBody(BaseModel):
    ids: Annotated[list[Annotated[str, Field(max_length=800)]], Field(max_length=1000)]


class LevelBody(BaseModel):
    level: Literal["debug", "info", "warning", "error"]


def make_app(daemon: Daemon, token: str = "") -> FastAPI:
    """The routes, over one daemon. With a token, everything but /healthz wants `Authorization: Bearer TOKEN`."""
    app = FastAPI(title="pdserve cache", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and request.url.path != "/healthz" and not hmac.compare_digest(given.encode(), token.encode()):
            return JSONResponse({"detail": "this address wants Authorization: Bearer TOKEN"}, 401)
        return await call_next(request)

    @app.exception_handler(RequestValidationError)
    async def not_understood(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": "; ".join(_sentence(e) for e in error.errors()[:3])}, 422)

    _looking(app, daemon)
    _acting(app, daemon)
    return app


def _sentence(error: dict[str, Any]) -> str:
    """What is wrong with a request: where, what was given, what would fit."""
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"][1:]).lstrip(".")
    fit = error["msg"][:1].lower() + error["msg"][1:]
    if error["type"] == "string_pattern_mismatch":
        fit = f"give {2 * KEY_BYTES} hexadecimal digits, as GET /cache/objects and `pdserve cache ls` show keys"
    given = "" if error["type"] in ("missing", "json_invalid") else f" {error['input']!r:.80}:"
    return f"{where or 'body'}:{given} {fit}"


def _looking(app: FastAPI, daemon: Daemon) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/status")
    async def status() -> dict[str, Any]:
        return daemon.status()

    @app.get("/config")
    async def config() -> dict[str, Any]:
        return daemon.config()

    @app.get("/metrics")
    async def metrics() -> Response:
        daemon.refresh_gauges()
        return Response(generate_latest(daemon.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/cache/stats")
    async def stats() -> dict[str, Any]:
        return {"dram": daemon.store.stats(), **daemon.tiering.stats()}

    @app.get("/cache/objects")
    async def objects(
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=10000)] = 1000,
        tier: str = "dram",
    ) -> dict[str, Any]:
        """Chunks of a tier, paged: in memory those that can be hit, below those that the tier can list."""
        listed = daemon.catalog.objects(tier, offset, limit)
        if listed is None:
            known = ", ".join(daemon.catalog.listable())
            raise HTTPException(404, f"tier: no tier {tier!r} here that can be listed. Known: {known}.")
        total, some = listed
        return {"total": total, "offset": offset, "objects": some}

    @app.post("/requests")
    async def requests(body: RequestsBody) -> dict[str, Any]:
        """What engines told of these requests, and what is known of the chunks that they missed."""
        return {"requests": daemon.requests.told(body.ids)}

    @app.get("/began")
    async def began() -> Response:
        """A line of JSON for each prompt that begins to be computed: what of it was cached. Stays open."""
        if daemon.requests.listeners.full:
            raise HTTPException(503, "too many listen already")
        return StreamingResponse(daemon.requests.listeners.stream(), media_type="application/x-ndjson")

    @app.get("/cache/events")
    async def events(life: str = "", seq: Annotated[int, Query(ge=0)] = 0) -> Response:
        """Server-sent events: how much of the latest prompts is in memory, as it changes, from behind event `seq` of that
        life of this daemon; everything first where that is not known."""
        if daemon.held.full:
            raise HTTPException(503, "too many listen already")
        return StreamingResponse(daemon.held.stream(life, seq), media_type="text/event-stream")

    @app.get("/requests/{request_id:path}")
    async def request(request_id: str) -> dict[str, Any]:
        legs = daemon.requests.told([request_id]).get(request_id)
        if legs is None:
            raise HTTPException(404, "no engine told of such a request, or it was long ago")
        return {"id": request_id, "legs": legs}


def _acting(app: FastAPI, daemon: Daemon) -> None:
    @app.delete("/cache")
    async def clear(salt: str | None = None, prefix: Hex | None = None, shared: bool = False) -> dict[str, Any]:
        """All, with `shared` also in tiers that other hosts use; or what was stored under one cache_salt, or the chunk
        `prefix` and everything that builds on it, everywhere."""
        if salt == "":
            raise HTTPException(422, "an empty salt is everybody who gives none: leave it out to clear everything")
        if salt is not None:
            dropped, outcome = daemon.drop(*daemon.catalog.of_tag(tenant_tag(salt)))
        elif prefix is not None:
            dropped, outcome = daemon.drop(*daemon.catalog.below(bytes.fromhex(prefix)))
        else:
            dropped, outcome = daemon.clear(shared)
        ends = time.monotonic() + DELETE_S
        while outcome.pending and time.monotonic() < ends:  # noqa: ASYNC110 - a few milliseconds, of threads
            await asyncio.sleep(0.005)
        return {
            "dropped": dropped,
            "tiers": outcome.tiers,
            "pending": sorted(outcome.pending),
            "finished": not outcome.pending,
        }

    @app.post("/cache/prefetch")
    async def prefetch(body: KeysBody) -> dict[str, int]:
        """Brings the run of these keys up from the lower tiers; asking again says how many are still coming."""
        return {"loading": daemon.tiering.loading([bytes.fromhex(k) for k in body.keys], time.monotonic())}

    @app.post("/cache/pin")
    async def pin(body: PinBody) -> dict[str, Any]:
        keys = [bytes.fromhex(k) for k in body.keys]
        wanted = len(keys)
        if body.request:
            found = daemon.requests.keys(body.request, body.tokens)
            if found is None:
                return {"pinned": 0, "refused": 0, "why": "no engine here told of this request", "wanted": None}
            keys, wanted = found[-1:], len(found)  # the last stands for all before it
        pinned, refused, why = daemon.pins.pin(keys, body.ttl_s, time.monotonic())
        return {"pinned": pinned, "refused": refused, "why": why, "wanted": wanted}

    @app.post("/cache/unpin")
    async def unpin(body: KeysBody) -> dict[str, int]:
        return {"unpinned": daemon.pins.unpin([bytes.fromhex(k) for k in body.keys])}

    @app.post("/peers/drain")
    async def drain(on: bool = True) -> dict[str, bool]:
        """Takes nothing new from other hosts, but gives what it has; or takes again."""
        if daemon.node is None:
            raise HTTPException(404, "this daemon has no peers")
        daemon.node.drain(on)
        return {"draining": on}

    @app.get("/peers/states")
    async def states() -> dict[str, Any]:
        """What the supervisors of the other hosts say of their processes, by host; null from whom no answer came."""
        if daemon.node is None:
            return {}
        return {name: json.loads(text) if text else None for name, text in (await daemon.node.states()).items()}

    @app.post("/cache/scrub")
    async def scrub(fast: bool = False) -> dict[str, Any]:
        """A pass now; GET /status says how it goes."""
        if daemon.scrubber is None:
            raise HTTPException(503, "not running yet")
        daemon.scrubber.start(at_once=fast)
        return dict(daemon.scrubber.state)

    @app.get("/loglevel")
    async def loglevel() -> dict[str, str]:
        return {"level": logging.getLevelName(logging.getLogger("pdserve").level).lower()}

    @app.post("/loglevel")
    async def set_loglevel(body: LevelBody) -> dict[str, str]:
        logging.getLogger("pdserve").setLevel(body.level.upper())
        return {"level": body.level}

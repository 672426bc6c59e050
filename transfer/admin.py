"""The daemon's HTTP side: health, status, metrics, what is in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import FastAPI, Query, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

if TYPE_CHECKING:
    from pdserve.transfer.daemon import Daemon


def make_app(daemon: Daemon) -> FastAPI:
    """The routes, over one daemon."""
    app = FastAPI(title="pdserve cache", docs_url=None, redoc_url=None)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/status")
    async def status() -> dict[str, Any]:
        return daemon.status()

    @app.get("/metrics")
    async def metrics() -> Response:
        daemon.refresh_gauges()
        return Response(generate_latest(daemon.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/cache/objects")
    async def objects(
        offset: Annotated[int, Query(ge=0)] = 0, limit: Annotated[int, Query(ge=1, le=10000)] = 1000
    ) -> dict[str, Any]:
        """Visible chunks, paged, in the order in which they were reserved."""
        chunks = list(daemon.store.chunks())
        page = [
            {"key": c.key.hex(), "parent": c.parent.hex(), "tokens": c.tokens, "bytes": c.payload_bytes, "digests": [f"{d:016x}" for d in c.digests if d is not None],
             "leases": c.leases, "tier": "dram"}
            for c in chunks[offset : offset + limit]
        ]  # fmt: skip
        return {"total": len(chunks), "offset": offset, "objects": page}

    @app.delete("/cache")
    async def clear() -> dict[str, int]:
        return {"dropped": daemon.store.clear()}

    return app

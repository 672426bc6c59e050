"""The page and all behind it, as the app holds it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from fastapi import FastAPI
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pdserve.proxy.access import Access
from pdserve.proxy.dashboard.board import Board, Folder, Memory
from pdserve.proxy.dashboard.caches import CacheView
from pdserve.proxy.dashboard.collector import Collector
from pdserve.proxy.dashboard.feed import Feed
from pdserve.proxy.dashboard.page import Page
from pdserve.proxy.dashboard.supervised import Supervised
from pdserve.proxy.fleet import Fleet
from pdserve.proxy.options import Settings


class _Events:
    """Given to the router as an object, which makes it an ASGI endpoint and not a function that returns a response."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._feed.events(scope, receive, send)


class Dashboard:
    def __init__(self, fleet: Fleet, settings: Settings, own: Callable[[], bytes], folder: Path | None) -> None:
        """`own` gives the proxy's /metrics; `folder` is what the workers of one proxy share, if there are several."""
        self._board: Board = Folder(folder / "dashboard") if folder else Memory()
        self._caches = [CacheView(name, url, settings.admin_token) for name, url in settings.caches]
        about = {
            "version": metadata.version("pdserve"),
            "workers": settings.workers,
            "slo_ttft": settings.slo_ttft or None,
        }
        supervised = Supervised(settings.state_file)
        self._collector = Collector(fleet, self._caches, own, self._board, supervised, about)
        self.feed = Feed(self._board, Access(settings.admin_token))
        self.page = Page()
        self._task: asyncio.Task[None] | None = None

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/dashboard", self.page.index, methods=["GET", "HEAD"])
        app.add_api_route("/dashboard/", self.page.slash, methods=["GET", "HEAD"])
        app.add_api_route("/dashboard/{name}", self.page.file, methods=["GET", "HEAD"])
        app.add_api_route("/admin/overview", self.feed.overview, methods=["GET"])
        app.router.routes.append(Route("/admin/events", _Events(self.feed), methods=["GET"]))

    async def start(self) -> None:
        self._task = asyncio.create_task(self._collector.run(), name="dashboard collector")

    async def stop(self) -> None:
        self.feed.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for cache in self._caches:
            await cache.close()
        self._board.close()

"""The files of the page, from memory: /dashboard and /dashboard/FILE. They hold no data, so anybody may have them."""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import Request, Response

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
#: nothing from elsewhere, nothing inline, nobody may frame it
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


class Page:
    def __init__(self) -> None:
        folder = files("pdserve.proxy.dashboard") / "static"
        self._files = {
            entry.name: (entry.read_bytes(), _TYPES[suffix])
            for entry in folder.iterdir()
            if (suffix := "." + entry.name.rpartition(".")[2]) in _TYPES
        }

    @property
    def size(self) -> int:
        return sum(len(body) for body, _ in self._files.values())

    async def index(self, request: Request) -> Response:
        return self._give(request, "index.html")

    async def slash(self) -> Response:
        """Relative, so that it holds behind a server that serves us under a prefix."""
        return Response(status_code=308, headers={"location": "../dashboard"})

    async def file(self, request: Request) -> Response:
        return self._give(request, request.path_params["name"])

    def _give(self, request: Request, name: str) -> Response:
        if name not in self._files:
            return Response(f"There is no {name!r} here.", 404, HEADERS, media_type="text/plain")
        body, kind = self._files[name]
        tag = f'"{hashlib.blake2b(body, digest_size=8).hexdigest()}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=HEADERS | {"etag": tag})
        return Response(body, headers=HEADERS | {"etag": tag, "content-type": kind})

"""Taking engines in and out while requests run: /admin/instances, for whoever has the admin key.

GET     /admin/instances            what there is, and how it is
POST    /admin/instances            {"name": "decode-2", "role": "decode", "url": "http://..."}: taken in at once
DELETE  /admin/instances/NAME       drains it: nothing new, and gone when the last request has ended
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Annotated

import msgspec
from fastapi import FastAPI, Request, Response

from pdserve.errors import ConfigError, RequestError
from pdserve.proxy import openai
from pdserve.proxy.access import Access
from pdserve.proxy.fleet import Fleet
from pdserve.proxy.instance import Instance
from pdserve.proxy.options import ROLES
from pdserve.proxy.upstream import Upstream

_BODY_LIMIT = 64 * 1024


class _Wanted(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")]
    role: str
    url: str


class Admin:
    def __init__(self, fleet: Fleet, key: str) -> None:
        self._fleet, self._access = fleet, Access(key)
        self._draining: set[asyncio.Task[None]] = set()

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/admin/instances", self._guarded(self._list), methods=["GET"])
        app.add_api_route("/admin/instances", self._guarded(self._add), methods=["POST"])
        app.add_api_route("/admin/instances/{name}", self._guarded(self._remove), methods=["DELETE"])

    def _guarded(self, answer: Callable[..., object]) -> Callable[..., object]:
        async def guarded(request: Request) -> Response:
            try:
                self._access.change(request.headers)
                return await answer(request)  # type: ignore[misc]
            except RequestError as error:
                return Response(openai.request_error(error), error.status, media_type="application/json")

        return guarded

    async def _list(self, _: Request) -> Response:
        shown = [
            {"name": i.name, "role": i.role, "url": i.upstream.url, "state": i.state, "in_flight": i.in_flight,
             "load": i.load, "models": sorted(i.models)}
            for i in self._fleet.instances
        ]  # fmt: skip
        return Response(json.dumps({"instances": shown}), media_type="application/json")

    async def _add(self, request: Request) -> Response:
        if int(request.headers.get("content-length") or _BODY_LIMIT + 1) > _BODY_LIMIT:
            raise RequestError(413, "This body has to come with its length, and be a small one.")
        try:
            wanted = msgspec.json.decode(await request.body(), type=_Wanted)
            if wanted.role not in ROLES:
                raise RequestError(400, f"'role' must be one of {', '.join(ROLES)}.", param="role")
            instance = Instance(wanted.name, wanted.role, Upstream(wanted.name, wanted.url))
        except (msgspec.DecodeError, ConfigError) as exc:
            raise RequestError(400, str(exc)) from exc
        before = self._fleet.listed()
        await self._fleet.add(instance)
        self._fleet.shared.change(instance.name, (instance.role, instance.upstream.url), before)
        told = {"name": instance.name, "state": instance.state}
        return Response(json.dumps(told), 201, media_type="application/json")

    async def _remove(self, request: Request) -> Response:
        instance = self._fleet.named(request.path_params["name"])
        if instance is None:
            raise RequestError(404, "There is no such instance.", "NotFoundError", code="not_found")
        if not instance.draining:
            self._fleet.shared.change(instance.name, None, self._fleet.listed())
            instance.draining = True
            task = asyncio.create_task(self._fleet.remove(instance), name=f"drain {instance.name}")
            self._draining.add(task)
            task.add_done_callback(self._draining.discard)
        told = {"name": instance.name, "state": instance.state, "in_flight": instance.in_flight}
        return Response(json.dumps(told), 202, media_type="application/json")

    async def stop(self) -> None:
        for task in list(self._draining):
            task.cancel()
        await asyncio.gather(*self._draining, return_exceptions=True)

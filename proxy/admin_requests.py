"""Records of requests for people and the dashboard.

GET     /admin/requests?limit=100&state=active      the newest first
GET     /admin/requests/ID                          one, with its spans and where each chunk of its prompt came from
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request, Response

from pdserve.errors import RequestError
from pdserve.proxy import openai, told
from pdserve.proxy.access import Access
from pdserve.proxy.history import History
from pdserve.proxy.siblings import Siblings
from pdserve.proxy.told import Caches

MOST = 1000
STATES = ("active", "done", "failed", "cancelled", "recovered")


class AdminRequests:
    def __init__(self, history: History, siblings: Siblings, caches: Caches, access: Access) -> None:
        self._history, self._siblings, self._caches, self._access = history, siblings, caches, access

    def add_to(self, app: FastAPI) -> None:
        app.add_api_route("/admin/requests", self._list, methods=["GET"])
        app.add_api_route("/admin/requests/{request_id:path}", self._one, methods=["GET"])

    async def _list(self, request: Request) -> Response:
        try:
            self._access.look(request.headers, request.client.host if request.client else "")
            limit, state = _limit(request), request.query_params.get("state", "")
            if state and state not in STATES:
                raise RequestError(400, f"'state' must be one of {', '.join(STATES)}.", param="state")
            return _json({"requests": await self.records(limit, state)})
        except RequestError as error:
            return Response(openai.request_error(error), error.status, media_type="application/json")

    async def _one(self, request: Request) -> Response:
        try:
            self._access.look(request.headers, request.client.host if request.client else "")
            request_id = request.path_params["request_id"]
            record = await self._siblings.record(request_id)
            if record is None:
                text = "No request of that id is remembered here."
                raise RequestError(404, text, "NotFoundError", code="not_found")
            legs = (await self._caches.legs([request_id])).get(request_id, [])
            return _json(told.merged(record, legs))
        except RequestError as error:
            return Response(openai.request_error(error), error.status, media_type="application/json")

    async def records(self, limit: int, state: str = "") -> list[dict[str, Any]]:
        """The newest records, with what engines told of those that have ended."""
        found = await self._siblings.records(limit, state)
        unknown = [r["id"] for r in found if r["state"] != "active" and r["output_tokens"] is None]
        legs = await self._caches.legs(unknown)
        return [self._kept(record, legs[record["id"]]) if record["id"] in legs else record for record in found]

    def _kept(self, record: dict[str, Any], legs: told.Legs) -> dict[str, Any]:
        merged = told.merged(record, legs)
        self._history.fill(record["id"], merged)
        return merged


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", "100")
    if not text.isdecimal() or not 1 <= int(text[:6]) <= MOST:
        raise RequestError(400, f"'limit' must be a number from 1 to {MOST}.", param="limit")
    return int(text)


def _json(told: Any) -> Response:
    return Response(json.dumps(told), media_type="application/json")

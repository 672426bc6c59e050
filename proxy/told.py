"""What engines and cache daemons know of a request, asked for only when somebody looks at its record.

Engines report to the cache daemon of their host; the daemons are asked over HTTP, all at once, within one second. What
nobody tells stays None: nothing here is estimated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx

from pdserve import log
from pdserve.proxy.history import Record

WITHIN_S = 1.0
#: what an engine tells of another time than that, and for the same id, is another request's
_APART_S = 5.0
_log = log.get("proxy.told")
Legs = list[dict[str, Any]]


class Caches:
    """The daemons named by --cache. `token` is the admin token, which daemons ask for where they have one."""

    def __init__(self, caches: Sequence[tuple[str, str]], token: str) -> None:
        self._caches = caches
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._client: httpx.AsyncClient | None = None

    async def stop(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def legs(self, ids: Sequence[str]) -> dict[str, Legs]:
        """Request id -> what each engine told of it, the daemons' own findings included."""
        found: dict[str, Legs] = {}
        if ids and self._caches:
            for answer in await asyncio.gather(*(self._ask(name, url, ids) for name, url in self._caches)):
                for request_id, legs in answer.items():
                    found.setdefault(request_id, []).extend(legs)
        return found

    async def _ask(self, name: str, url: str, ids: Sequence[str]) -> dict[str, Legs]:
        if self._client is None:
            self._client = httpx.AsyncClient(timeout=WITHIN_S, headers=self._headers)
        try:
            async with asyncio.timeout(WITHIN_S):
                reply = await self._client.post(f"{url}/requests", json={"ids": list(ids)})
            reply.raise_for_status()
            told: dict[str, Legs] = reply.json()["requests"]
            return told
        except (httpx.HTTPError, TimeoutError, ValueError, KeyError) as exc:
            _log.debug("%s at %s told nothing: %r", name, url, exc)
            return {}


def merged(record: Record, legs: Legs) -> Record:
    """The record with what the legs tell. Pure.

    The leg that computed the prompt (the producer's, else the only one) says what was cached and why the rest was not;
    the leg that answered says how long the answer became.
    """
    legs = [leg for leg in legs if _of_its_time(leg, record)]
    first = _of(legs, record["prefill"]) or _of(legs, record["decode"])
    last = _of(legs, record["decode"]) or first
    told = dict(record)
    if first:
        keys = ("prompt_tokens", "cached_tokens", "load_ms", "saved_ms")
        told |= {key: first[key] for key in keys if first.get(key) is not None}
    if last:
        told |= {key: last[key] for key in ("output_tokens", "finish_reason") if last.get(key) is not None}
    if "spans" in record:
        spans = [*record["spans"], *(span(record, leg, s) for leg in legs for s in leg.get("spans", ()))]
        told["spans"] = sorted(spans, key=lambda s: float(s["start_ms"]))
        told["chunks"] = first.get("chunks") if first else None
        told["notes"] = [note for leg in legs for note in leg.get("notes", ())]
    return told


def _of_its_time(leg: dict[str, Any], record: Record) -> bool:
    """Clients may use an id again; clocks of hosts may differ a little."""
    at = leg.get("at") or next((span["at"] for span in leg.get("spans", ())), record["received"])
    age = float(at) - float(record["received"])
    return -_APART_S < age < (record["duration_ms"] or 0.0) / 1000 + _APART_S


def span(record: Record, leg: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """An engine's span, its beginning counted from the arrival of the request."""
    start = round((told["at"] - record["received"]) * 1000, 3)
    kept = {key: told.get(key) for key in ("bytes", "tokens", "tier", "detail")}
    return {"name": told["name"], "instance": leg["instance"], "start_ms": start, "ms": told["ms"], **kept}


def _of(legs: Legs, instance: str | None) -> dict[str, Any]:
    """The latest leg on that instance."""
    return next((leg for leg in reversed(legs) if instance and leg["instance"] == instance), {})

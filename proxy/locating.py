"""Asks the hosts' cache daemons what they still hold of the prompts that were routed lately, and tells routing.

Engines' replies say where a prompt was computed; what happens to it afterwards (evicted, cleared, pushed to another
host, brought up from disk) only the daemons know. A daemon that answers with another id has begun a new life: what was
believed of it is forgotten before its answer is read. Engines' restarts are seen by the fleet's probes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

import msgspec

from pdserve import log
from pdserve.proxy.policies.base import Facts
from pdserve.proxy.routing import Routing
from pdserve.proxy.upstream import LegFailure, Upstream

EVERY = 2.0
WITHIN_S = 1.0
_REPLY_LIMIT = 1024 * 1024
_log = log.get("proxy.locating")


class _Held(msgspec.Struct):
    daemon_id: str
    held: dict[str, tuple[int, int]]


class Locating:
    def __init__(self, routing: Routing, caches: Sequence[tuple[str, str]], token: str) -> None:
        """A daemon's host is that of its address, as an engine's is."""
        self._routing = routing
        self._caches = [(Upstream(name, url), urlsplit(url).hostname or "") for name, url in caches]
        self._auth = [(b"authorization", f"Bearer {token}".encode())] if token else []
        self._lives: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if self._caches and self._routing.by_prompt:
            self._task = asyncio.create_task(self._run(), name="probe caches")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for cache, _ in self._caches:
            await cache.close()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            await self.ask()

    async def ask(self) -> None:
        """One round. A daemon that does not answer leaves things as they are."""
        recent = dict(self._routing.recent)
        for cache, host in self._caches:
            with contextlib.suppress(LegFailure):
                self._told(cache.name, host, recent, await self._post(cache, list(recent)))

    def _told(self, name: str, host: str, recent: Mapping[str, Facts], reply: _Held) -> None:
        if self._lives.setdefault(name, reply.daemon_id) != reply.daemon_id:
            _log.info("%s has begun a new life", name)
            self._lives[name] = reply.daemon_id
            self._routing.forget(host=host)
        for request, (tokens, of) in reply.held.items():
            facts = recent.get(request)
            if facts is not None and of:
                self._routing.located(facts, host, len(facts.blocks) * tokens // of)

    async def _post(self, cache: Upstream, ids: list[str]) -> _Held:
        until = asyncio.get_running_loop().time() + WITHIN_S
        headers = [(b"content-type", b"application/json"), *self._auth]
        body = msgspec.json.encode({"ids": ids})
        async with cache.request(b"POST", b"/cache/held", headers, body, WITHIN_S, until) as answer:
            raw = await answer.read(_REPLY_LIMIT, until)
        if answer.status != 200:
            raise LegFailure(answer.status, f"/cache/held answered {answer.status}", cache.name, "status")
        try:
            return msgspec.json.decode(raw, type=_Held)
        except msgspec.DecodeError as exc:
            raise LegFailure(502, f"/cache/held: {exc}", cache.name, "broken") from exc

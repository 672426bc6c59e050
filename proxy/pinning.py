"""Keeps what `cache_control` markers ask for: the prefix up to a marker is pinned in the caches for its time.

It happens behind the request, which never waits for it. An engine counts the tokens up to the marker, the daemons, which
were told by their engines what the request's prompt was, pin the whole chunks within them, under the quota of the tenant
(cache_salt). Chunks are stored while the answer is being made, so a daemon that has not got them yet is asked again.
The same prefix is not pinned anew before a good part of its time is over.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import msgspec

from pdserve import log
from pdserve.proxy import markers
from pdserve.proxy.fleet import Fleet
from pdserve.proxy.markers import Marker
from pdserve.proxy.upstream import LegFailure, Upstream

WITHIN_S = 5.0  # of one question to an engine or a daemon
PAUSES = (0.3, 0.7, 1.5, 3.0, 6.0)  # between tries, seconds
AT_ONCE = 64
REMEMBERED = 4096
ANEW = 0.25  # of its time that must be over before a prefix is pinned again
_REPLY_LIMIT = 16 * 1024 * 1024
_JSON = (b"content-type", b"application/json")
_log = log.get("proxy.pinning")
Headers = list[tuple[bytes, bytes]]


class Pinning:
    def __init__(self, fleet: Fleet, caches: Sequence[tuple[str, str]], token: str, made: dict[str, Any]) -> None:
        """`token` is the admin token, which daemons ask for where they have one."""
        self._fleet, self._counted = fleet, made["prefix_pins_total"]
        self._caches = [Upstream(name, url) for name, url in caches]
        self._auth: Headers = [(b"authorization", f"Bearer {token}".encode())] if token else []
        self._tasks: set[asyncio.Task[None]] = set()
        self._pinned: OrderedDict[bytes, float] = OrderedDict()  # prefix -> when it may be pinned again

    def begin(self, endpoint: str, request_id: str, headers: Headers, raw: bytes) -> None:
        """Pins what the markers of this request ask for, in a task of its own. Called when its answer has begun or
        ended well: its prompt is computed, and has been told of."""
        if not self._caches or b'"cache_control"' not in raw or len(self._tasks) >= AT_ONCE:
            return
        due = [marker for marker in markers.markers(endpoint, raw) if self._due(marker)]
        if due:
            task = asyncio.create_task(self._all(endpoint, request_id, headers, due), name=f"pin {request_id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for cache in self._caches:
            await cache.close()

    def _due(self, marker: Marker) -> bool:
        now = asyncio.get_running_loop().time()
        key = blake2b(marker.counted + marker.salt.encode(), digest_size=16).digest()
        if self._pinned.get(key, 0.0) > now:
            return False
        self._pinned[key] = now + ANEW * marker.ttl
        self._pinned.move_to_end(key)
        while len(self._pinned) > REMEMBERED:
            self._pinned.popitem(last=False)
        return True

    async def _all(self, endpoint: str, request_id: str, headers: Headers, due: list[Marker]) -> None:
        for marker in due:
            try:
                how = await self._one(endpoint, request_id, headers, marker)
            except (LegFailure, msgspec.DecodeError) as exc:
                how = "failed"
                _log.warning("request %s: its prefix could not be pinned: %s", request_id, exc)
            self._counted.labels(how).inc()

    async def _one(self, endpoint: str, request_id: str, headers: Headers, marker: Marker) -> str:
        """One of: pinned, short (no whole chunk before the marker), refused (the quota), failed."""
        count = await self._count(endpoint, headers, marker)
        if count is None:
            return "failed"
        body = msgspec.json.encode({"request": request_id, "tokens": count, "ttl_s": marker.ttl})
        left = list(self._caches)
        how = "failed"
        for pause in (*PAUSES, None):
            for cache in list(left):
                told = msgspec.json.decode(await self._post(cache, b"/cache/pin", self._auth, body))
                if told["wanted"] == 0:
                    return "short"
                if told["pinned"] and not told["refused"]:
                    how = "pinned"
                    left.remove(cache)
                elif "quota" in told["why"]:
                    _log.info("request %s: %s: %s", request_id, cache.name, told["why"])
                    return "refused"
            if not left or pause is None or how == "pinned":  # the daemon of the engine that computed it has it
                break
            await asyncio.sleep(pause)
        return how

    async def _count(self, endpoint: str, headers: Headers, marker: Marker) -> int | None:
        engines = self._fleet.consumers()
        if not engines:
            return None
        engine = min(engines, key=lambda e: e.load)
        kept = [pair for pair in headers if pair[0] not in (b"content-type", b"x-request-id")]
        return markers.tokens(
            endpoint, await self._post(engine.upstream, markers.count_path(endpoint), kept, marker.counted)
        )

    async def _post(self, upstream: Upstream, path: bytes, headers: Headers, body: bytes) -> bytes:
        until = asyncio.get_running_loop().time() + WITHIN_S
        async with upstream.request(b"POST", path, [*headers, _JSON], body, WITHIN_S, until) as answer:
            reply = await answer.read(_REPLY_LIMIT, until)
        if answer.status != 200:
            raise LegFailure(answer.status, f"{path.decode()} answered {answer.status}", upstream.name, "status")
        return reply

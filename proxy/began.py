"""What was cached of the prompts that engines answer alone, known in time for their answers' headers.

Engines tell their cache daemon of it in the moment in which a prompt's own tokens begin to be computed, one step of the
model before its first token; the daemons pass it on at once, on a connection that each worker keeps open to each of
them. So nothing is asked while a client waits: when the first event comes, the facts are here or they are not told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from pdserve import log
from pdserve.proxy.upstream import LegFailure, Upstream

WITHIN_S = 2.0  # for a connection, and for its first byte
SILENT_S = 15.0  # a daemon sends an empty line every few seconds
RETRY_S = 1.0
#: an answer that comes in one piece waits so long for facts which are on their way
WHOLE_S = 0.05
#: clocks of hosts may differ a little; what an engine tells of another time, for the same id, is another request's
_APART_S = 5.0
_LINE_LIMIT = 64 * 1024
_log = log.get("proxy.began")
Told = dict[str, Any]


class _Line(msgspec.Struct):
    request: str
    instance: str
    at: float
    cached: dict[str, int]
    load_ms: float | None = None
    saved_ms: float | None = None
    load_reason: str = ""


class _Expected:
    __slots__ = ("by_instance", "changed", "requests", "since")

    def __init__(self) -> None:
        self.requests, self.since = 1, time.time()
        self.by_instance: dict[str, _Line] = {}
        self.changed: asyncio.Event | None = None


class Began:
    """What is kept is bounded by the requests that run."""

    def __init__(self, caches: Sequence[tuple[str, str]], token: str) -> None:
        """`caches` are the daemons' names and admin addresses; `token` is what they ask for, if they do."""
        self._caches = [Upstream(name, url) for name, url in caches]
        self._auth = [(b"authorization", f"Bearer {token}".encode())] if token else []
        self._tasks: list[asyncio.Task[None]] = []
        self._expected: dict[str, _Expected] = {}
        self._tellers: set[str] = set()  # instances that told of their latest request in time
        self._decoder = msgspec.json.Decoder(_Line)

    def __len__(self) -> int:
        return len(self._expected)

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._listen(cache), name=f"probe {cache.name}") for cache in self._caches]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for cache in self._caches:
            await cache.close()

    @contextmanager
    def expected(self, request: str) -> Iterator[None]:
        """Within it, what is told of that request is kept."""
        self.expect(request)
        try:
            yield
        finally:
            self.forget(request)

    def expect(self, request: str) -> None:
        """From now on what is told of it is kept, until forget()."""
        if not self._caches:
            return
        if (known := self._expected.get(request)) is not None:
            known.requests += 1
        else:
            self._expected[request] = _Expected()

    def forget(self, request: str) -> None:
        if (known := self._expected.get(request)) is not None:
            known.requests -= 1
            if not known.requests:
                del self._expected[request]

    def of(self, request: str, instance: str) -> Told | None:
        """What that engine told of it; None if it has not, or if several requests of that id run, so that it may be the
        other's."""
        known = self._expected.get(request)
        line = known.by_instance.get(instance) if known is not None and known.requests == 1 else None
        if line is None:
            return None
        return {"cached": line.cached, "load_ms": line.load_ms, "saved_ms": line.saved_ms, "load_reason": line.load_reason}

    async def of_whole(self, request: str, instance: str) -> Told | None:
        """The same for an answer that is complete: the facts were told before it, and may be a moment behind it."""
        found = self.of(request, instance)
        known = self._expected.get(request)
        if found is not None or known is None or known.requests > 1 or instance not in self._tellers:
            return found
        known.changed = asyncio.Event()
        try:
            async with asyncio.timeout(WHOLE_S):
                while instance not in known.by_instance:
                    await known.changed.wait()
                    known.changed.clear()
        except TimeoutError:
            self._tellers.discard(instance)  # it has stopped to tell, or its daemon has: the next one is not kept waiting
        return self.of(request, instance)

    async def _listen(self, cache: Upstream) -> None:
        while True:
            try:
                await self._hear(cache)
            except LegFailure as exc:
                _log.debug("%s tells nothing: %s", cache.name, exc)
            except Exception:  # noqa: BLE001 - what one daemon sends must not end this for good
                _log.exception("%s told something unforeseen", cache.name)
            await asyncio.sleep(RETRY_S)

    async def _hear(self, cache: Upstream) -> None:
        until = asyncio.get_running_loop().time() + WITHIN_S
        async with cache.request(b"GET", b"/began", self._auth, b"", WITHIN_S, until) as answer:
            if answer.status != 200:
                raise LegFailure(answer.status, f"/began answered {answer.status}", cache.name, "status")
            rest = b""
            while data := await answer.chunk(SILENT_S):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._take(line)
                if len(rest) > _LINE_LIMIT:
                    raise LegFailure(502, "/began: a line without an end", cache.name, "broken")

    def _take(self, raw: bytes) -> None:
        if not raw:
            return
        try:
            line = self._decoder.decode(raw)
        except msgspec.DecodeError as exc:
            _log.debug("not a line of /began: %s", exc)
            return
        known = self._expected.get(line.request)
        if known is None or line.at < known.since - _APART_S:
            return
        self._tellers.add(line.instance)
        known.by_instance[line.instance] = line
        if known.changed is not None:
            known.changed.set()

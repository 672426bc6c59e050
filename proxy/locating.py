"""Listens to the hosts' cache daemons for what they hold of the prompts that were routed lately, and tells routing.

Engines' replies say where a prompt was computed; what happens to it afterwards (evicted, cleared, pushed to another
host, brought up from disk) only the daemons know. Each worker keeps a connection open to each of them and is told of
every change, by number. A connection that was lost is made again, from the last number on; a daemon that has begun a new
life, or that no longer knows what was missed, tells everything. One that is silent for long is believed to have nothing.
Engines' restarts are seen by the fleet's probes.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pdserve import log
from pdserve.proxy.policies.base import Facts
from pdserve.proxy.routing import RECENT, Routing
from pdserve.proxy.upstream import LegFailure, Upstream

WITHIN_S = 2.0  # for a connection, and for its first byte
SILENT_S = 15.0  # a daemon sends an empty comment every few seconds
RETRY_S, RETRY_MOST_S = 0.2, 5.0
GONE_S = 20.0  # without a word: what was believed of it is forgotten
_EVENT_LIMIT = 16 * 1024 * 1024
_log = log.get("proxy.locating")


class _Change(msgspec.Struct):
    seq: int
    request: str
    tokens: int
    of: int


class _All(msgspec.Struct):
    daemon_id: str
    seq: int
    held: dict[str, tuple[int, int]]


class _Daemon:
    """What is known of one, and since when. Its host is that of its address, as an engine's is."""

    def __init__(self, name: str, url: str) -> None:
        self.upstream, self.host = Upstream(name, url), urlsplit(url).hostname or ""
        self.life, self.seq = "", 0
        self.held: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self.new: set[str] = set()  # requests of which something was told that routing has not been told yet
        self.heard: float | None = None  # the loop's time of its last word
        self.believed = False


class Locating:
    def __init__(self, routing: Routing, caches: Sequence[tuple[str, str]], token: str, made: Mapping[str, Any]) -> None:
        self._routing, self._metrics = routing, made
        self._daemons = [_Daemon(name, url) for name, url in caches]
        self._auth = [(b"authorization", f"Bearer {token}".encode())] if token else []
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        if not self._routing.by_prompt:
            return
        self._routing.on_learned = self._learned
        for daemon in self._daemons:
            self._tasks.append(asyncio.create_task(self._listen(daemon), name=f"probe {daemon.upstream.name}"))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for daemon in self._daemons:
            await daemon.upstream.close()

    async def _listen(self, daemon: _Daemon) -> None:
        loop, wait = asyncio.get_running_loop(), RETRY_S
        while True:
            began = loop.time()
            try:
                await self._hear(daemon)
            except LegFailure as exc:
                _log.debug("%s tells nothing: %s", daemon.upstream.name, exc)
            except Exception:  # noqa: BLE001 - what one daemon sends must not end this for good
                _log.exception("%s told something unforeseen", daemon.upstream.name)
            wait = RETRY_S if daemon.heard is not None and daemon.heard > began else min(2 * wait, RETRY_MOST_S)
            if daemon.believed and (daemon.heard is None or loop.time() - daemon.heard > GONE_S):
                _log.info("%s has been silent for %g s: it counts as empty", daemon.upstream.name, GONE_S)
                self._forget(daemon)
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))

    async def _hear(self, daemon: _Daemon) -> None:
        loop, name = asyncio.get_running_loop(), daemon.upstream.name
        path = b"/cache/events?life=%b&seq=%d" % (daemon.life.encode(), daemon.seq)
        async with daemon.upstream.request(b"GET", path, self._auth, b"", WITHIN_S, loop.time() + WITHIN_S) as answer:
            if answer.status != 200:
                raise LegFailure(answer.status, f"/cache/events answered {answer.status}", name, "status")
            rest = b""
            while data := await answer.chunk(SILENT_S):
                daemon.heard = loop.time()
                self._metrics["location_heard_timestamp_seconds"].labels(name).set_to_current_time()
                *events, rest = (rest + data).split(b"\n\n")
                for event in events:
                    self._take(daemon, event)
                self._tell_new(daemon)
                if len(rest) > _EVENT_LIMIT:
                    raise LegFailure(502, "/cache/events: an event without an end", name, "broken")

    def _take(self, daemon: _Daemon, event: bytes) -> None:
        """Raises LegFailure for what is no event, or not the next one: the connection is begun anew, and told everything."""
        lines = dict(line.split(b": ", 1) for line in event.split(b"\n") if b": " in line)
        if not lines:
            return
        try:
            if lines.get(b"event") == b"all":
                self._take_all(daemon, msgspec.json.decode(lines[b"data"], type=_All))
            else:
                self._take_change(daemon, msgspec.json.decode(lines[b"data"], type=_Change))
        except (msgspec.DecodeError, KeyError, ValueError) as exc:
            daemon.life = ""
            raise LegFailure(502, f"/cache/events: {exc}", daemon.upstream.name, "broken") from exc

    def _take_all(self, daemon: _Daemon, told: _All) -> None:
        if daemon.life != told.daemon_id:
            if daemon.life:
                _log.info("%s has begun a new life", daemon.upstream.name)
            self._forget(daemon)
        self._metrics["location_resyncs_total"].labels(daemon.upstream.name).inc()
        daemon.life, daemon.seq = told.daemon_id, told.seq
        daemon.held = OrderedDict(list(told.held.items())[-2 * RECENT :])
        for facts in list(self._routing.recent.values()):
            self._tell(daemon, facts)

    def _take_change(self, daemon: _Daemon, change: _Change) -> None:
        if change.seq != daemon.seq + 1:
            raise ValueError(f"event {change.seq} came after {daemon.seq}")
        daemon.seq = change.seq
        daemon.held[change.request] = change.tokens, change.of
        daemon.held.move_to_end(change.request)
        while len(daemon.held) > 2 * RECENT:
            daemon.held.popitem(last=False)
        daemon.new.add(change.request)

    def _tell_new(self, daemon: _Daemon) -> None:
        for request in daemon.new:
            if (facts := self._routing.recent.get(request)) is not None:
                self._tell(daemon, facts)
        daemon.new.clear()

    def _learned(self, facts: Facts) -> None:
        """A reply came. What the daemons have told of this prompt before is known better than what the reply lets guess."""
        for daemon in self._daemons:
            self._tell(daemon, facts)

    def _tell(self, daemon: _Daemon, facts: Facts) -> None:
        tokens, of = daemon.held.get(facts.request, (0, 0))
        if of:
            daemon.believed = True
            self._routing.located(facts, daemon.host, len(facts.blocks) * tokens // of)

    def _forget(self, daemon: _Daemon) -> None:
        daemon.life, daemon.believed = "", False
        daemon.held.clear()
        self._routing.forget(host=daemon.host)

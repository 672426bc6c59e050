"""Copies the engine's blocks into the arena, on a thread of its own.

What is stored belongs to a request whose blocks may be taken away: by preemption (at once: `cancel`), or at its end
(only when `outstanding` says that nothing is left to copy).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from pdserve import log
from pdserve.engines.vllm.copier import RPC_S, Copier
from pdserve.engines.vllm.facts import StoreFacts
from pdserve.engines.vllm.giving_way import GivingWay
from pdserve.engines.vllm.messages import ChunkSave, SaveJob
from pdserve.engines.vllm.parts import Parts
from pdserve.errors import CacheError
from pdserve.transfer import wire
from pdserve.transfer.arena import Arena
from pdserve.transfer.client import CacheClient
from pdserve.transfer.staging import Copy, Pages, Part, stride_of

#: saves that wait; beyond this they are dropped, because a save must never slow the engine down
MAX_QUEUED = 4096
#: chunks that are committed together; fewer would let a consumer start earlier, and cost more round trips
COMMIT_TOGETHER = 4


class Saver(Copier):
    """One thread. `done(request id)` is called, from it or from put(), once for every job that was put."""

    def __init__(
        self,
        client: CacheClient,
        done: Callable[[str], None],
        *,
        shards: int,
        writer: str,
        facts: StoreFacts,
        way: GivingWay,
    ) -> None:
        super().__init__(client, "pdserve-save")
        self._way = way
        self._done, self._shards, self._writer, self._facts = done, shards, writer, facts
        self._lock = threading.Condition()
        self._outstanding: dict[str, list[SaveJob]] = {}  # accepted and not done, by request
        self._cancelled: set[int] = set()  # id() of outstanding jobs that must not begin another copy
        self._copying = ""  # the request whose blocks are being read at this moment

    def put(self, jobs: list[SaveJob], mark: Any) -> None:
        """`mark`: the point in the engine's work behind which their blocks are full."""
        with self._lock:
            for job in jobs:
                self._outstanding.setdefault(job.request_id, []).append(job)
        for job in jobs:
            if self._jobs.qsize() >= MAX_QUEUED:
                tokens = sum(c.tokens for c in job.chunks)
                self._log.warning("save queue full: %d tokens not stored request_id=%s", tokens, job.request_id)
                self._ended(job)
            else:
                self._jobs.put((job, mark))

    @property
    def busy(self) -> bool:
        return bool(self._outstanding)

    def outstanding(self, request_id: str) -> bool:
        with self._lock:
            return bool(self._outstanding.get(request_id))

    def cancel(self, request_ids: set[str]) -> None:
        """Their blocks are about to be reused: no copy of them may begin, one that runs is waited for.

        The wait is a few chunks' copies (milliseconds): reading blocks never waits for the daemon.
        """
        with self._lock:
            cancelled = {id(job) for request_id in request_ids for job in self._outstanding.get(request_id, ())}
            self._cancelled |= cancelled
            while self._copying in request_ids and self._copying:
                self._lock.wait()
        if cancelled and self._pages is not None:
            self._pages.settle()

    # ---- the thread ----

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            self._save(*item)

    def _save(self, job: SaveJob, mark: Any) -> None:
        try:
            if self._pages is not None and self._pages.stores:
                self._copy_in(job, mark)
        except CacheError as e:
            self._log.debug("not stored: %s request_id=%s", e, job.request_id)
        except Exception:  # noqa: BLE001 - the border to the engine: a save that fails is a later miss, never more
            self._log.exception("save failed request_id=%s", job.request_id)
        self._ended(job)

    def _copy_in(self, job: SaveJob, mark: Any) -> None:
        assert self._pages is not None
        pages, started = self._pages, time.perf_counter()
        items = [self._item(job, chunk, part) for chunk in job.chunks for part in pages.parts]
        grants = self._client.reserve(self._writer, items, RPC_S)
        arena, daemon_id = self._client.arena, self._client.daemon_id
        rows = [(chunk, grants[i * len(pages.parts) :][: len(pages.parts)]) for i, chunk in enumerate(job.chunks)]
        granted = [(c, row) for c, row in rows if all(g.status == wire.GRANTED for g in row)]
        refused = sum(c.tokens for c, row in rows if any(g.status in (wire.FULL, wire.TOO_LARGE) for g in row))
        moving = _Moving(self._client, daemon_id)
        try:
            if arena is not None and granted:
                pages.attach(arena, self._client.chunk_tokens)
                for some, piece in self._way.stores(granted, pages.together, lambda: not self._jobs.empty()):
                    if not self._begin_copy(job):
                        break
                    try:
                        _submit(pages, arena, mark, some, piece, moving)
                    finally:
                        self._end_copy()
                    moving.commit(COMMIT_TOGETHER * len(pages.parts))
            moving.commit()
        finally:
            moving.give_up([g.reservation for g in grants if g.status == wire.GRANTED])
        if moving.tokens:
            self._log.info(
                "stored %d tokens in %.1f ms request_id=%s",
                moving.tokens,
                (time.perf_counter() - started) * 1000,
                job.request_id,
            )
        if (moving.tokens or refused) and pages.tells:
            size = pages.parts[0].shard_bytes
            nbytes = sum(size(c.tokens, len(c.block_ids)) * self._shards for c, _ in granted)
            self._facts.stored(job.request_id, moving.tokens, nbytes, time.perf_counter() - started, refused)
        if refused:
            self._log.warning("no room in the cache: %d tokens not stored request_id=%s", refused, job.request_id)

    def _item(self, job: SaveJob, chunk: ChunkSave, part: Pages) -> wire.ReserveItem:
        return wire.ReserveItem(
            chunk.key,
            chunk.parent,
            part.first_shard,
            self._shards,
            part.shard_bytes(chunk.tokens, len(chunk.block_ids)),
            chunk.tokens,
            job.tag,
            part.shard_count,
        )

    def _begin_copy(self, job: SaveJob) -> bool:
        with self._lock:
            if id(job) in self._cancelled:
                return False
            self._copying = job.request_id
            return True

    def _end_copy(self) -> None:
        with self._lock:
            self._copying = ""
            self._lock.notify_all()

    def _ended(self, job: SaveJob) -> None:
        self._done(job.request_id)  # first, so that who sees nothing outstanding has the report of it
        with self._lock:
            self._cancelled.discard(id(job))
            jobs = self._outstanding[job.request_id]
            jobs.remove(job)
            if not jobs:
                del self._outstanding[job.request_id]


def _submit(
    pages: Parts,
    arena: Arena,
    mark: Any,
    chunks: Sequence[tuple[ChunkSave, list[wire.Grant]]],
    piece: int,
    moving: _Moving,
) -> None:
    for place, part in enumerate(pages.parts):
        last = place == len(pages.parts) - 1
        targets = [_target(part, arena, chunk, grants[place]) for chunk, grants in chunks]
        copies = part.store_all(mark, targets, piece)
        for (chunk, grants), copy in zip(chunks, copies, strict=False):
            moving.add(grants[place], chunk.tokens if last else 0, copy)


def _target(part: Pages, arena: Arena, chunk: ChunkSave, grant: wire.Grant) -> Part:
    stride = stride_of(part.shard_bytes(chunk.tokens, len(chunk.block_ids)))
    area = arena.bytes[grant.offset : grant.offset + part.shard_count * stride]
    return chunk.block_ids, chunk.tokens, area, stride


class _Moving:
    """The chunks of one save that are on their way into the arena, and what has arrived and is not committed yet."""

    def __init__(self, client: CacheClient, daemon_id: str) -> None:
        self._client, self._daemon_id = client, daemon_id
        self._copies: deque[tuple[wire.Grant, int, Copy]] = deque()
        self._settled: set[int] = set()  # reservations that were committed
        self.tokens = 0  # committed

    def add(self, grant: wire.Grant, tokens: int, copy: Copy) -> None:
        self._copies.append((grant, tokens, copy))

    def commit(self, at_least: int = 0) -> None:
        """Tells the daemon what has arrived, if that is `at_least` so many chunks; 0: waits for all of them."""
        arrived = 0
        while arrived < len(self._copies) and (not at_least or self._copies[arrived][2].done()):
            if not at_least:
                self._copies[arrived][2].digests()
            arrived += 1
        if not arrived or arrived < at_least or self._client.daemon_id != self._daemon_id:
            return  # a new daemon knows nothing of these reservations
        ready = [self._copies[i] for i in range(arrived)]
        items = []
        for grant, _, copy in ready:
            first, *more = copy.digests()
            items.append(wire.CommitItem(grant.reservation, first, more))
        self._client.commit(items, RPC_S)
        for grant, tokens, _ in ready:
            self._copies.popleft()
            self._settled.add(grant.reservation)
            self.tokens += tokens

    def give_up(self, reservations: list[int]) -> None:
        """Gives back what was not committed, once nothing writes there any more."""
        for _, _, copy in self._copies:
            try:
                copy.digests()
            except Exception:  # noqa: BLE001 - a device that fails writes nothing either; the reservation goes back all the same
                log.get("connector").exception("a copy that was given up ended badly")
        left = [r for r in reservations if r not in self._settled]
        if left and self._client.daemon_id == self._daemon_id:
            with contextlib.suppress(CacheError):  # the daemon takes them back by itself
                self._client.abort(left, RPC_S)

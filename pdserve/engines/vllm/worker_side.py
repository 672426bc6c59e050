"""The workers' half: copies blocks into the arena and back, on threads of its own, while the engine steps.

Nothing here may raise into the engine (an exception in a worker kills it) or make a step wait, with one exception:
blocks of a preempted request are about to be overwritten, so a copy of them that is running is waited for.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pdserve import log
from pdserve.engines.vllm.messages import ChunkLoad, ChunkSave, LoadJob, LoadResult, SaveJob, StepPlan, WorkerReport
from pdserve.errors import CacheError
from pdserve.transfer import wire
from pdserve.transfer.arena import Arena
from pdserve.transfer.client import CacheClient
from pdserve.transfer.staging import Copy, Pages, Part, stride_of

RPC_S = 5.0
#: saves that wait; beyond this they are dropped, because a save must never slow the engine down
MAX_QUEUED_SAVES = 4096
#: chunks that are committed together; fewer would let a consumer start earlier, and cost more round trips
COMMIT_TOGETHER = 4


class WorkerSide:
    """One per worker process. `pages` is set once vLLM has registered its KV caches."""

    def __init__(self, client: CacheClient, *, shards: int, writer: str) -> None:
        self._client, self._shards, self._writer = client, shards, writer
        self._pages: Pages | None = None
        self._log = log.get("connector")
        self._lock = threading.Condition()
        self._report = WorkerReport()
        self._outstanding: dict[str, list[SaveJob]] = {}  # accepted and not done, by request
        self._cancelled: set[int] = set()  # id() of outstanding jobs that must not begin another copy
        self._copying = ""  # the request whose blocks are being read at this moment
        self._awaiting: set[str] = set()
        self._recv_done: set[str] = set()
        self._recv_failed: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._blocks: dict[str, set[int]] = {}
        # Each job with the point in the engine's work that it must not overtake.
        self._saves: queue.Queue[tuple[SaveJob, Any] | None] = queue.Queue()
        self._loads: queue.Queue[tuple[LoadJob, Any] | None] = queue.Queue()
        self._threads = [
            threading.Thread(target=self._run, args=(self._saves, self._save), name="pdserve-save", daemon=True),
            threading.Thread(target=self._run, args=(self._loads, self._load), name="pdserve-load", daemon=True),
        ]

    def register(self, pages: Pages) -> None:
        self._pages = pages
        self._log.info("kernels: %s", pages.describe())
        if pages.on_device:
            with contextlib.suppress(
                CacheError
            ):  # the client has warned; the arena is attached when the daemon is there
                self._client.connect()
                self._attach()
        for thread in self._threads:
            thread.start()

    def _attach(self) -> None:
        assert self._pages is not None
        arena = self._client.arena
        if arena is not None:
            self._pages.attach(arena, self._client.chunk_tokens)

    # ---- called by the engine, every step ----

    def start_loads(self, plan: StepPlan) -> None:
        if self._pages is not None:
            self._pages.decoding(plan.decodes)
        with self._lock:
            # Here and not with the saves: some vLLM versions announce no saves in a step that computes nothing.
            self._awaiting |= plan.awaiting
        # Blocks that a load fills may have belonged to a request whose last step is still running on the device.
        mark = self._mark() if plan.loads else None
        for job in plan.loads:
            with self._lock:
                self._blocks[job.request_id] = {b for c in job.chunks for b in c.block_ids if b is not None}
            self._loads.put((job, mark))

    def _mark(self) -> Any:
        assert self._pages is not None
        return self._pages.mark()

    def start_saves(self, plan: StepPlan) -> None:
        """The step has been submitted: what it computes may be copied after this point."""
        mark = self._mark() if plan.saves else None
        with self._lock:
            for job in plan.saves:
                self._outstanding.setdefault(job.request_id, []).append(job)
        for job in plan.saves:
            if self._saves.qsize() >= MAX_QUEUED_SAVES:
                self._log.warning(
                    "save queue full: %d tokens not stored request_id=%s",
                    sum(c.tokens for c in job.chunks),
                    job.request_id,
                )
                self._save_done(job)
            else:
                self._saves.put((job, mark))

    def before_overwrite(self, plan: StepPlan) -> None:
        """Blocks of preempted requests are about to be reused: no copy of them may begin, one that runs is waited for.

        The wait is a few chunks' copies (milliseconds): reading blocks never waits for the daemon.
        """
        with self._lock:
            cancelled = {id(job) for request_id in plan.preempted for job in self._outstanding.get(request_id, ())}
            self._cancelled |= cancelled
            while self._copying in plan.preempted and self._copying:
                self._lock.wait()
        if cancelled and self._pages is not None:
            self._pages.settle()

    def finished(self) -> tuple[set[str], set[str], set[str], set[int]]:
        """(saves done of awaited requests, loads ended, those of them that failed, their blocks), each reported once."""
        with self._lock:
            sent = {r for r in self._awaiting if not self._outstanding.get(r)}
            self._awaiting -= sent
            received, self._recv_done = self._recv_done, set()
            failed, self._recv_failed = self._recv_failed, set()
            blocks, self._failed_blocks = self._failed_blocks, set()
        return sent, received, failed, blocks

    def report(self) -> WorkerReport | None:
        with self._lock:
            if not self._report.saved and not self._report.loaded:
                return None
            report, self._report = self._report, WorkerReport()
        return report

    def close(self) -> None:
        for q in (self._saves, self._loads):
            q.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=RPC_S)
        if self._pages is not None and not any(t.is_alive() for t in self._threads):
            self._pages.close()
        self._client.close()

    # ---- threads ----

    def _run(self, jobs: queue.Queue[Any], work: Callable[[Any, Any], None]) -> None:
        _any_core()
        try:
            self._client.connect()  # now rather than in the first request: mapping the arena takes a while
        except CacheError as e:
            self._log.debug("%s", e)
        while (job := jobs.get()) is not None:
            work(*job)

    def _load(self, job: LoadJob, mark: Any) -> None:
        result = LoadResult()
        started = time.perf_counter()
        try:
            self._copy_out(job, mark, result)
        except Exception as e:  # noqa: BLE001 - the border to the engine: whatever it was, the tokens are recomputed
            result.error = f"{type(e).__name__}: {e}"
            self._log.exception("load failed, tokens are recomputed request_id=%s", job.request_id)
        result.seconds = time.perf_counter() - started
        with self._lock:
            blocks = self._blocks.pop(job.request_id, set())
            if result.error:
                self._recv_failed.add(job.request_id)
                self._failed_blocks |= blocks
            self._recv_done.add(job.request_id)
            self._report.loaded[job.request_id] = result

    def _copy_out(self, job: LoadJob, mark: Any, result: LoadResult) -> None:
        assert self._pages is not None
        if not self._client.connected:
            self._client.connect()
        arena = self._client.arena
        if arena is None or self._client.daemon_id != job.daemon_id:
            result.error = "the cache daemon was restarted between lookup and load"
            return
        self._attach()
        pages, moving = self._pages, deque[tuple[ChunkLoad, Copy]]()
        try:
            for at in range(0, len(job.chunks), pages.together):
                some = job.chunks[at : at + pages.together]
                copies = pages.load_all(mark, [self._source(pages, arena, chunk) for chunk in some])
                moving.extend(zip(some, copies, strict=False))
                if len(copies) < len(some):
                    raise CacheError("the device refused a chunk")
                while moving and moving[0][1].done() and not result.error:
                    self._check(*moving.popleft(), result)
                if result.error:
                    break
        finally:
            # Whatever happened: blocks are not reported while something may still write into them.
            for chunk, copy in moving:
                self._check(chunk, copy, result)

    @staticmethod
    def _source(pages: Pages, arena: Arena, chunk: ChunkLoad) -> Part:
        if pages.shard_bytes(chunk.tokens, len(chunk.block_ids)) != chunk.shard_bytes:
            raise CacheError(f"a shard of {chunk.shard_bytes} bytes does not hold {chunk.tokens} tokens")
        start = chunk.offset + pages.first_shard * chunk.stride
        return (
            chunk.block_ids,
            chunk.tokens,
            arena.bytes[start : start + pages.shard_count * chunk.stride],
            chunk.stride,
        )

    def _check(self, chunk: ChunkLoad, copy: Copy, result: LoadResult) -> None:
        """Waits for a chunk to be in its blocks, and compares what was read with what was stored."""
        assert self._pages is not None
        first = self._pages.first_shard
        if copy.digests() != chunk.digests[first : first + self._pages.shard_count]:
            result.corrupt.append(chunk.key)
            result.error = f"digest mismatch of chunk {chunk.key.hex()[:16]}"
            return
        result.chunks += 1
        result.nbytes += self._pages.shard_count * chunk.shard_bytes

    def _save(self, job: SaveJob, mark: Any) -> None:
        try:
            if self._pages is not None and self._pages.stores:
                self._copy_in(job, mark)
        except CacheError as e:
            self._log.debug("not stored: %s request_id=%s", e, job.request_id)
        except Exception:  # noqa: BLE001 - the border to the engine: a save that fails is a later miss, never more
            self._log.exception("save failed request_id=%s", job.request_id)
        self._save_done(job)

    def _copy_in(self, job: SaveJob, mark: Any) -> None:
        assert self._pages is not None
        pages, started = self._pages, time.perf_counter()
        items = [
            wire.ReserveItem(
                c.key,
                c.parent,
                pages.first_shard,
                self._shards,
                pages.shard_bytes(c.tokens, len(c.block_ids)),
                c.tokens,
                job.tag,
                pages.shard_count,
            )
            for c in job.chunks
        ]
        grants = self._client.reserve(self._writer, items, RPC_S)
        arena, daemon_id = self._client.arena, self._client.daemon_id
        granted = [(c, g) for c, g in zip(job.chunks, grants, strict=True) if g.status == wire.GRANTED]
        moving = _Moving(self._client, daemon_id)
        try:
            if arena is not None and granted:
                self._attach()
                for at in range(0, len(granted), pages.together):
                    some = granted[at : at + pages.together]
                    if not self._begin_copy(job):
                        break
                    try:
                        copies = pages.store_all(mark, [self._target(pages, arena, c, g) for c, g in some])
                    finally:
                        self._end_copy()
                    for (chunk, grant), copy in zip(some, copies, strict=False):
                        moving.add(grant, chunk.tokens, copy)
                    moving.commit(COMMIT_TOGETHER)
            moving.commit()
        finally:
            moving.give_up([g.reservation for _, g in granted])
        if moving.tokens:
            self._log.info(
                "stored %d tokens in %.1f ms request_id=%s",
                moving.tokens,
                (time.perf_counter() - started) * 1000,
                job.request_id,
            )
        refused = sum(
            c.tokens for c, g in zip(job.chunks, grants, strict=True) if g.status in (wire.FULL, wire.TOO_LARGE)
        )
        if refused:
            self._log.warning("no room in the cache: %d tokens not stored request_id=%s", refused, job.request_id)

    @staticmethod
    def _target(pages: Pages, arena: Arena, chunk: ChunkSave, grant: wire.Grant) -> Part:
        stride = stride_of(pages.shard_bytes(chunk.tokens, len(chunk.block_ids)))
        area = arena.bytes[grant.offset : grant.offset + pages.shard_count * stride]
        return chunk.block_ids, chunk.tokens, area, stride

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

    def _save_done(self, job: SaveJob) -> None:
        with self._lock:
            self._cancelled.discard(id(job))
            jobs = self._outstanding[job.request_id]
            jobs.remove(job)
            if not jobs:
                del self._outstanding[job.request_id]
            self._report.saved[job.request_id] = self._report.saved.get(job.request_id, 0) + 1


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


def _any_core() -> None:
    """CPU vLLM binds its process to the cores that compute, and a thread inherits that: a copy would always take turns
    with the computation, while another core may be idle."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))

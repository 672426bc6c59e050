"""The workers' half: copies blocks into the arena and back, on threads of its own, while the engine steps.

Nothing here may raise into the engine (an exception in a worker kills it) or make a step wait, with one exception:
blocks of a preempted request are about to be overwritten, so a copy of them that is running is waited for.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from pdserve import kernels, log
from pdserve.engines.vllm.messages import LoadJob, LoadResult, SaveJob, StepPlan, WorkerReport
from pdserve.errors import CacheError
from pdserve.transfer import wire
from pdserve.transfer.client import CacheClient
from pdserve.transfer.staging import HostPages

RPC_S = 5.0
#: saves that wait; beyond this they are dropped, because a save must never slow the engine down
MAX_QUEUED_SAVES = 4096


class WorkerSide:
    """One per worker process. `pages` is set once vLLM has registered its KV caches."""

    def __init__(self, client: CacheClient, *, rank: int, shards: int, writer: str) -> None:
        self._client, self._rank, self._shards, self._writer = client, rank, shards, writer
        self._pages: HostPages | None = None
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
        self._saves: queue.Queue[SaveJob | None] = queue.Queue()
        self._loads: queue.Queue[LoadJob | None] = queue.Queue()
        self._threads = [
            threading.Thread(target=self._run, args=(self._saves, self._save), name="pdserve-save", daemon=True),
            threading.Thread(target=self._run, args=(self._loads, self._load), name="pdserve-load", daemon=True),
        ]

    def register(self, pages: HostPages) -> None:
        self._pages = pages
        kind, why = kernels.path()
        self._log.info(
            "kernels: %s%s; %d layers, %d blocks of %d bytes",
            kind,
            f" ({why})" if why else "",
            pages.layers,
            pages.num_blocks,
            pages.block_bytes,
        )
        for thread in self._threads:
            thread.start()

    # ---- called by the engine, every step ----

    def start_loads(self, plan: StepPlan) -> None:
        for job in plan.loads:
            with self._lock:
                self._blocks[job.request_id] = {b for c in job.chunks for b in c.block_ids if b is not None}
            self._loads.put(job)

    def start_saves(self, plan: StepPlan) -> None:
        """The step has run: what it computed may be copied now."""
        with self._lock:
            self._awaiting |= plan.awaiting
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
                self._saves.put(job)

    def before_overwrite(self, plan: StepPlan) -> None:
        """Blocks of preempted requests are about to be reused: no copy of them may begin, one that runs is waited for.

        The wait is one chunk's copy (milliseconds): reading blocks never waits for the daemon.
        """
        with self._lock:
            for request_id in plan.preempted:
                self._cancelled.update(id(job) for job in self._outstanding.get(request_id, ()))
            while self._copying in plan.preempted and self._copying:
                self._lock.wait()

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
        self._client.close()

    # ---- threads ----

    def _run(self, jobs: queue.Queue[Any], work: Callable[[Any], None]) -> None:
        _any_core()
        try:
            self._client.connect()  # now rather than in the first request: mapping the arena takes a while
        except CacheError as e:
            self._log.debug("%s", e)
        while (job := jobs.get()) is not None:
            work(job)

    def _load(self, job: LoadJob) -> None:
        result = LoadResult()
        started = time.perf_counter()
        try:
            self._copy_out(job, result)
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

    def _copy_out(self, job: LoadJob, result: LoadResult) -> None:
        assert self._pages is not None
        if not self._client.connected:
            self._client.connect()
        arena = self._client.arena
        if arena is None or self._client.daemon_id != job.daemon_id:
            result.error = "the cache daemon was restarted between lookup and load"
            return
        for chunk in job.chunks:
            start = chunk.offset + self._rank * chunk.stride
            source = arena.bytes[start : start + chunk.shard_bytes]
            if self._pages.shard_bytes(len(chunk.block_ids)) != chunk.shard_bytes:
                raise CacheError(f"a shard of {chunk.shard_bytes} bytes does not hold {len(chunk.block_ids)} blocks")
            if self._pages.scatter(source, chunk.block_ids) != chunk.digests[self._rank]:
                result.corrupt.append(chunk.key)
                result.error = f"digest mismatch of chunk {chunk.key.hex()[:16]}"
                return
            result.chunks += 1
            result.nbytes += chunk.shard_bytes

    def _save(self, job: SaveJob) -> None:
        try:
            self._copy_in(job)
        except CacheError as e:
            self._log.debug("not stored: %s request_id=%s", e, job.request_id)
        except Exception:  # noqa: BLE001 - the border to the engine: a save that fails is a later miss, never more
            self._log.exception("save failed request_id=%s", job.request_id)
        self._save_done(job)

    def _copy_in(self, job: SaveJob) -> None:
        assert self._pages is not None
        started = time.perf_counter()
        items = [
            wire.ReserveItem(
                c.key, c.parent, self._rank, self._shards, self._pages.shard_bytes(len(c.block_ids)), c.tokens
            )
            for c in job.chunks
        ]
        grants = self._client.reserve(self._writer, items, RPC_S)
        arena, daemon_id = self._client.arena, self._client.daemon_id
        done: list[wire.CommitItem] = []
        given_up: list[int] = []
        tokens = 0
        for chunk, item, grant in zip(job.chunks, items, grants, strict=True):
            if grant.status != wire.GRANTED:
                continue
            if arena is None or not self._begin_copy(job):
                given_up.append(grant.reservation)
                continue
            try:
                digest = self._pages.gather(
                    chunk.block_ids, arena.bytes[grant.offset : grant.offset + item.shard_bytes]
                )
            finally:
                self._end_copy()
            done.append(wire.CommitItem(grant.reservation, digest))
            tokens += chunk.tokens
        if self._client.daemon_id != daemon_id:
            return  # a new daemon knows nothing of these reservations
        if given_up:
            self._client.abort(given_up, RPC_S)
        if done:
            self._client.commit(done, RPC_S)
            self._log.info(
                "stored %d tokens in %.1f ms request_id=%s",
                tokens,
                (time.perf_counter() - started) * 1000,
                job.request_id,
            )
        refused = sum(
            c.tokens for c, g in zip(job.chunks, grants, strict=True) if g.status in (wire.FULL, wire.TOO_LARGE)
        )
        if refused:
            self._log.warning("no room in the cache: %d tokens not stored request_id=%s", refused, job.request_id)

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


def _any_core() -> None:
    """CPU vLLM binds its process to the cores that compute, and a thread inherits that: a copy would always take turns
    with the computation, while another core may be idle."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))

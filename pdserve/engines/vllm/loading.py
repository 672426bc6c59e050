"""Copies chunks from the arena into the engine's blocks, on a thread of its own.

A load may begin before all of its chunks exist: those that a producer is still writing are looked up again and again,
and copied as they come, until all are here or none has come for `stall_s`. Such a load never holds up another one, and it asks
for the next chunks while the last ones are still on their way into the blocks.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from pdserve import log
from pdserve.engines.vllm.copier import RPC_S, Copier
from pdserve.engines.vllm.giving_way import GivingWay
from pdserve.engines.vllm.messages import ChunkExpected, ChunkLoad, LoadJob, LoadResult
from pdserve.engines.vllm.parts import Parts
from pdserve.errors import CacheError
from pdserve.transfer.arena import Arena
from pdserve.transfer.client import CacheClient
from pdserve.transfer.staging import Copy, Pages, Part

#: how often chunks that are still to come are asked for (an engine on a GPU needs no core of the host's), and how many at a time
POLL_S, POLL_GPU_S = 0.002, 0.0005
WINDOW = 64


class Loader(Copier):
    """One thread. `done(job, result, failed blocks)` is called on it, once for every job that was put."""

    def __init__(
        self, client: CacheClient, done: Callable[[LoadJob, LoadResult, set[int]], None], *, way: GivingWay
    ) -> None:
        super().__init__(client, "pdserve-load")  # jobs: a load, or the requests that nobody waits for any more
        self._done, self._way = done, way
        self._arriving: list[_Load] = []

    def put(self, job: LoadJob, mark: Any) -> None:
        """`mark`: the point in the engine's work that the load must not overtake."""
        self._jobs.put(_Load(job, mark, self._way, self._others_wait))

    def drop(self, request_ids: set[str]) -> None:
        """Nobody waits for these any more: what is still to come for them is not waited for."""
        if request_ids:
            self._jobs.put(request_ids)

    # ---- the thread ----

    def _run(self) -> None:
        poll_s = POLL_GPU_S if self._pages is not None and self._pages.on_device else POLL_S
        while True:
            # What has just come is rarely alone.
            pause = 0.0 if any(load.came for load in self._arriving) else poll_s
            try:
                item = self._jobs.get(timeout=pause if self._arriving else None)
            except queue.Empty:
                pass
            else:
                if item is None:
                    break
                if isinstance(item, _Load):
                    self._arriving.append(item)
                else:
                    for load in (x for x in self._arriving if x.job.request_id in item):
                        load.result.error = "the request is gone"
            self._arriving = [load for load in self._arriving if not self._advance(load)]
            self._way.loading(any(load.moving for load in self._arriving))
        for load in self._arriving:
            load.result.error = "the engine is closing"
            self._end(load)

    def _others_wait(self) -> bool:
        """Asked by a load on this thread, about others."""
        return len(self._arriving) > 1 or not self._jobs.empty()

    def _advance(self, load: _Load) -> bool:
        """Whether it has ended."""
        try:
            assert self._pages is not None
            if not load.result.error:
                load.advance(self._pages, self._client)
        except CacheError as e:
            load.result.error = str(e)
        except Exception as e:  # noqa: BLE001 - the border to the engine: whatever it was, the tokens are recomputed
            load.result.error = f"{type(e).__name__}: {e}"
            self._log.exception("load failed, tokens are recomputed request_id=%s", load.job.request_id)
        if load.open and not load.result.error:
            return False
        self._end(load)
        return True

    def _end(self, load: _Load) -> None:
        if self._pages is not None:
            load.land(self._pages, self._client, wait=True)
        load.result.seconds = time.perf_counter() - load.started
        self._done(load.job, load.result, load.unfilled())


class _Flight:
    """Chunks that were found together, on their way into the engine's blocks. `lease` holds them in the arena; None: the
    scheduler's own does."""

    def __init__(self, tiers: Sequence[str], lease: int | None) -> None:
        self.tiers, self.lease = tiers, lease
        self.chunks: Sequence[ChunkLoad] = ()
        self.verified: list[int] = []  # parts of each chunk that are as they were stored
        self.moving = deque[tuple[int, Pages, Copy]]()
        self.corrupt: list[bytes] = []

    def read(self, parts: int) -> int:
        """How many, from the first on, are in their blocks."""
        return next((i for i, verified in enumerate(self.verified) if verified < parts), len(self.verified))


class _Load:
    """One job under way."""

    def __init__(self, job: LoadJob, mark: Any, way: GivingWay, others_wait: Callable[[], bool]) -> None:
        self.job, self._mark, self._way, self._others_wait = job, mark, way, others_wait
        self.result = LoadResult()
        self.started = time.perf_counter()
        self.came = False  # whether the last look found something
        self._come_at = time.monotonic()  # when the last chunk came
        self._ready = list(job.chunks)
        self._expected = deque(job.expected)
        self._flights = deque[_Flight]()
        self._whole = True  # whether all that has landed is in its blocks

    @property
    def open(self) -> bool:
        return bool(self._ready or self._expected or self._flights)

    @property
    def moving(self) -> bool:
        return bool(self._flights)

    def unfilled(self) -> set[int]:
        """Blocks that do not hold what they should."""
        chunks: list[ChunkLoad | ChunkExpected] = [*self.job.chunks, *self.job.expected]
        rest = chunks[self.result.filled :]
        return {b for chunk in rest for b in chunk.block_ids if b is not None}

    def advance(self, pages: Parts, client: CacheClient) -> None:
        self.came = False
        if self._ready:
            ready, self._ready = self._ready, []
            arena, flight = self._arena(pages, client), _Flight([], None)
            self._flights.append(flight)
            self._fly(pages, arena, flight, ready)
        elif self._expected:
            self._look(pages, client)
        self.land(pages, client, wait=not self._expected)

    def _arena(self, pages: Parts, client: CacheClient) -> Arena:
        if not client.connected:
            client.connect()
        if client.arena is None or client.daemon_id != self.job.daemon_id:
            raise CacheError("the cache daemon was restarted between lookup and load")
        pages.attach(client.arena, client.chunk_tokens)
        return client.arena

    def _look(self, pages: Parts, client: CacheClient) -> None:
        arena = self._arena(pages, client)
        wanted = [self._expected[i] for i in range(min(WINDOW, len(self._expected)))]
        reply = client.lookup([c.key for c in wanted], RPC_S)
        if not reply.found:
            if time.monotonic() - self._come_at > self.job.stall_s:
                raise CacheError(f"no chunk has come for {self.job.stall_s:g} s, {len(self._expected)} are missing")
            return
        flight = _Flight([f.tier for f in reply.found], reply.lease)
        self._flights.append(flight)  # from here on it is landed, and its lease given back, whatever happens
        chunks = [_here(c, f) for c, f in zip(wanted, reply.found, strict=False)]
        for _ in chunks:
            self._expected.popleft()
        self.came = True
        self._fly(pages, arena, flight, chunks)

    def _fly(self, pages: Parts, arena: Arena, flight: _Flight, chunks: Sequence[ChunkLoad]) -> None:
        """Submits all of them, which waits while all buffers are in use."""
        flight.chunks, flight.verified = chunks, [0] * len(chunks)
        self._way.loading(True)
        at = 0
        for some, share in self._way.loads(chunks, pages.together, self._others_wait):
            for part in pages.parts:
                copies = part.load_all(self._mark, [_source(part, arena, chunk) for chunk in some], pages.share(share))
                flight.moving.extend((at + i, part, copy) for i, copy in enumerate(copies))
                if len(copies) < len(some):
                    raise CacheError("the device refused a chunk")
            at += len(some)
            self._verify(flight, wait=False)
            if self.result.error:
                break
        self._come_at = time.monotonic()  # the next ones have their time from here on, however long copying took

    def land(self, pages: Parts, client: CacheClient, *, wait: bool) -> None:
        """Takes in what has ended; `wait`: all of it. Blocks are not reported while something may still write into them."""
        while self._flights:
            flight = self._flights[0]
            self._verify(flight, wait=wait)
            if flight.moving:
                return
            self._flights.popleft()
            self._landed(flight, pages, client)

    def _verify(self, flight: _Flight, *, wait: bool) -> None:
        while flight.moving and (wait or flight.moving[0][2].done()):
            i, part, copy = flight.moving.popleft()
            try:
                flight.verified[i] += self._matches(flight.chunks[i], part, copy, flight.corrupt)
            except Exception as e:  # noqa: BLE001 - a device that fails fills nothing; the others are still waited for
                self.result.error = self.result.error or f"{type(e).__name__}: {e}"

    def _landed(self, flight: _Flight, pages: Parts, client: CacheClient) -> None:
        read = flight.read(len(pages.parts)) if self._whole else 0
        self._whole &= read == len(flight.chunks)
        self.result.filled += read
        shards = sum(part.shard_count for part in pages.parts)
        nbytes = sum(shards * chunk.shard_bytes for chunk in flight.chunks[:read])
        if flight.lease is None:
            self.result.chunks, self.result.nbytes = read, nbytes
            self.result.corrupt += flight.corrupt
            return
        self.result.late += flight.tiers[:read]
        # Only one rank tells what was read: the others read the same chunks' other shards.
        told = (read, nbytes) if pages.tells else (0, 0)
        if client.daemon_id != self.job.daemon_id:
            return  # that daemon is gone, and the lease with it
        try:
            client.release(flight.lease, RPC_S, *told, flight.corrupt)
        except CacheError as e:
            log.get("connector").debug("lease not released, it ends by itself: %s", e)

    def _matches(self, chunk: ChunkLoad, part: Pages, copy: Copy, corrupt: list[bytes]) -> bool:
        """Waits for a chunk's shards to be in their blocks, and compares what was read with what was stored."""
        if copy.digests() == chunk.digests[part.first_shard : part.first_shard + part.shard_count]:
            return True
        if chunk.key not in corrupt:
            corrupt.append(chunk.key)
        self.result.error = f"digest mismatch of chunk {chunk.key.hex()[:16]}"
        return False


def _here(chunk: ChunkExpected, found: Any) -> ChunkLoad:
    if found.tokens != chunk.tokens:
        raise CacheError(f"chunk {chunk.key.hex()[:16]} has {found.tokens} tokens, not {chunk.tokens}")
    return ChunkLoad(
        chunk.key, found.offset, found.tokens, found.shard_bytes, found.stride, found.digests, chunk.block_ids
    )


def _source(part: Pages, arena: Arena, chunk: ChunkLoad) -> Part:
    if part.shard_bytes(chunk.tokens, len(chunk.block_ids)) != chunk.shard_bytes:
        raise CacheError(f"a shard of {chunk.shard_bytes} bytes does not hold {chunk.tokens} tokens")
    start = chunk.offset + part.first_shard * chunk.stride
    area = arena.bytes[start : start + part.shard_count * chunk.stride]
    return chunk.block_ids, chunk.tokens, area, chunk.stride

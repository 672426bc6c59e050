"""The scheduler's half: what is cached already, what to load and to store in this step, when blocks may go.

Runs inside vLLM's scheduler, so everything is bounded: one lookup a request, with a deadline, and a miss when in doubt.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from pdserve import log
from pdserve.chunk import CANONICAL, ChunkLayout, KeyChain, root_key, tenant_tag
from pdserve.engines.vllm.messages import ChunkLoad, ChunkSave, LoadJob, LoadResult, SaveJob, StepPlan, WorkerReport
from pdserve.engines.vllm.tracked import Hit, Tracked, Wait
from pdserve.errors import CacheError, UnsupportedError
from pdserve.transfer.client import CacheClient

#: a lookup on the way of a request; what is not answered by then is a miss
LOOKUP_S = 0.05
RPC_S = 1.0
#: fewer tokens than this are computed rather than loaded or stored
MIN_TOKENS = 16
#: a GPU computes this many in the time that a load takes at least: a step more
MIN_LOAD_GPU = 256
#: how old a lookup may be when its request is finally scheduled
FRESH_S = 5.0
#: the prefill leg has ended, its last chunks may still be on their way into the arena: how long to wait for the first
#: sign of them, and for the next chunk after the last one seen
HANDOVER_START_S = 1.5
HANDOVER_STALL_S = 2.0
POLL_S = 0.002
#: chunks are on their way up from a lower tier: how long to wait for the next one after the last, and in all
FETCH_STALL_S = 1.0
FETCH_MAX_S = 30.0


class SchedulerSide:
    """One per engine. `client` is its own connection to the daemon, used for lookups and releases only."""

    def __init__(
        self, client: CacheClient, layout: ChunkLayout, fingerprint: str, *, workers: int, instance: str
    ) -> None:
        self._client, self._layout, self._fingerprint = client, layout, fingerprint
        self._workers, self._instance = workers, instance
        self._least_load = MIN_LOAD_GPU if layout.kind == CANONICAL else MIN_TOKENS
        self._requests: dict[str, Tracked] = {}
        self._loads: list[LoadJob] = []
        self._awaiting: set[str] = set()
        self._log = log.get("connector")
        self._chunk_tokens = 0
        self._busy = False  # whether the last step computed anything

    # ---- finding ----

    def matched(self, request: Any, local: int) -> tuple[int | None, bool]:
        """Tokens beyond the engine's own `local` ones that can be loaded; None: ask again (a handover is under way, or chunks
        are coming up from a lower tier)."""
        tracked = self._track(request)
        if tracked is None or tracked.no_load or tracked.loading is not None:
            return 0, False
        waits = [w for w in (tracked.handover, tracked.fetch) if w is not None and not w.over]
        if any(time.monotonic() - w.polled_at < POLL_S for w in waits):
            return None, False
        hit = tracked.hit
        if hit is None or time.monotonic() - hit.at > FRESH_S or hit.first_chunk != local // self._chunk_tokens:
            self._release_hit(tracked)
            hit = self._lookup(tracked, local)
        if self._fetch_incomplete(tracked, hit.end if hit else 0):
            self._release_hit(tracked)
            return None, False
        if self._handover_incomplete(tracked, hit.end if hit else 0):
            self._release_hit(tracked)
            return None, False
        if hit is None or hit.end - local < self._least_load:
            self._release_hit(tracked)
            return 0, False
        return hit.end - local, True

    def _track(self, request: Any) -> Tracked | None:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            if request.prompt_token_ids is None or not self._ready():
                return (
                    None  # prompt embeddings have no tokens to name them by; without a daemon there is nothing to find
                )
            media = [
                (str(f.identifier), f.mm_position.offset, f.mm_position.length)
                for f in getattr(request, "mm_features", None) or ()
            ]
            lora = request.lora_request
            root = root_key(
                self._fingerprint,
                self._layout,
                f"{lora.lora_name}:{lora.lora_path}" if lora else "",
                request.cache_salt or "",
            )
            tracked = self._requests[request.request_id] = Tracked(request, KeyChain(root, self._chunk_tokens, media))
        return tracked

    def _ready(self) -> bool:
        if self._chunk_tokens:
            return True
        try:
            self._client.connect(LOOKUP_S)
        except CacheError:
            return False
        self.check_chunk_tokens(self._client.chunk_tokens)
        return True

    def check_chunk_tokens(self, chunk_tokens: int) -> None:
        """Takes the daemon's chunk size. Raises UnsupportedError when it does not fit the engine's blocks."""
        if chunk_tokens % self._layout.block_tokens:
            raise UnsupportedError(
                f"chunks of {chunk_tokens} tokens are not whole engine blocks of {self._layout.block_tokens} tokens. "
                "Set cache.chunk_tokens to a multiple of it."
            )
        self._chunk_tokens = chunk_tokens

    def _lookup(self, tracked: Tracked, local: int) -> Hit | None:
        tokens = tracked.request.all_token_ids
        first = local // self._chunk_tokens
        keys = tracked.chain.full(tokens)[first:]
        tail = tracked.chain.tail(tokens)
        if tail is not None:
            keys = [*keys, tail]
        if not keys:
            return None
        try:
            reply = self._client.lookup(keys, LOOKUP_S)
        except CacheError:
            tracked.fetch = None
            return None
        if tracked.handover:
            tracked.handover.pending = reply.pending > 0
        if not reply.loading:
            tracked.fetch = None
        elif tracked.fetch is None:
            tracked.fetch = Wait(time.monotonic())
        if not reply.found:
            return None
        end = first * self._chunk_tokens + sum(f.tokens for f in reply.found)
        tracked.hit = Hit(reply.lease, self._client.daemon_id, first, reply.found, end, time.monotonic())
        return tracked.hit

    def _promised_tokens(self, request: Any) -> int:
        """How much of this prompt a producer says it has stored."""
        params = request.kv_transfer_params or {}
        count = params.get("pdserve.num_tokens")
        return min(count, request.num_tokens) if params.get("do_remote_prefill") and isinstance(count, int) else 0

    def _handover_incomplete(self, tracked: Tracked, seen: int) -> bool:
        """True while chunks that a producer has promised are missing and worth waiting for."""
        if seen >= self._promised_tokens(tracked.request):
            return False
        wait = tracked.handover = tracked.handover or Wait(time.monotonic())
        return self._ask_again(
            tracked, wait, seen, "handover incomplete", HANDOVER_STALL_S if wait.pending else HANDOVER_START_S
        )

    def _fetch_incomplete(self, tracked: Tracked, seen: int) -> bool:
        """True while chunks are on their way up from a lower tier and arrive steadily."""
        if tracked.fetch is None:
            return False
        return self._ask_again(tracked, tracked.fetch, seen, "lower tier too slow", FETCH_STALL_S, FETCH_MAX_S)

    def _ask_again(
        self, tracked: Tracked, wait: Wait, seen: int, trouble: str, stall: float, longest: float = float("inf")
    ) -> bool:
        if wait.over:
            return False
        now = time.monotonic()
        if not self._client.connected or not wait.goes_on(seen, now, stall, longest):
            wait.over = True
            missing = tracked.request.num_tokens - seen
            self._log.warning(
                "%s after %.1f s: %d tokens are computed here request_id=%s",
                trouble,
                now - wait.since,
                missing,
                tracked.request.request_id,
            )
            return False
        if not self._busy:
            time.sleep(POLL_S)  # nothing else runs: leave the core to whoever brings the chunks
        wait.polled_at = time.monotonic()
        return True

    # ---- loading ----

    def allocated(self, request: Any, block_ids: list[int], external: int) -> None:
        """vLLM has given the request its blocks; `external` tokens of them are ours to fill."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return
        tracked.block_ids = list(block_ids)
        hit, tracked.hit = tracked.hit, None
        if hit is None:
            return
        self._mark_stored(tracked, hit)
        if not external:
            self._release(hit)
            return
        local = hit.end - external
        tracked.loading, tracked.loading_from = hit, local
        try:
            job = LoadJob(request.request_id, hit.daemon_id, self._chunk_loads(tracked, hit, local))
        except Exception:  # noqa: BLE001 - the request waits for a report now: an empty job fails at once and is recomputed
            self._log.exception("planning a load failed request_id=%s", request.request_id)
            job = LoadJob(request.request_id, "", [])
        self._loads.append(job)

    def _chunk_loads(self, tracked: Tracked, hit: Hit, local: int) -> list[ChunkLoad]:
        size = self._layout.block_tokens
        have = local // size
        loads = []
        keys = [
            *tracked.chain.full(tracked.request.all_token_ids)[hit.first_chunk :],
            tracked.chain.tail(tracked.request.all_token_ids) or b"",
        ]
        start = hit.first_chunk * self._chunk_tokens
        for key, found in zip(keys, hit.found, strict=False):
            blocks = range(start // size, -(-(start + found.tokens) // size))
            loads.append(
                ChunkLoad(
                    key,
                    found.offset,
                    found.tokens,
                    found.shard_bytes,
                    found.stride,
                    found.digests,
                    [tracked.block_ids[b] if b >= have else None for b in blocks],
                )
            )
            start += found.tokens
        return loads

    def _mark_stored(self, tracked: Tracked, hit: Hit) -> None:
        """What the lookup found need not be stored again. (What lies before it, in the engine's own cache, is offered again:
        the daemon may have lost it, and takes it only then.)"""
        if hit.first_chunk == 0:
            tracked.next_chunk = max(tracked.next_chunk, hit.end // self._chunk_tokens)
        if hit.end == tracked.request.num_prompt_tokens:
            tracked.tail_done = True

    # ---- storing ----

    def plan(self, output: Any) -> StepPlan:
        """What the workers do in this step."""
        plan = StepPlan(loads=self._loads, awaiting=self._awaiting, preempted=set(output.preempted_req_ids or ()))
        self._loads, self._awaiting = [], set()
        self._busy = output.total_num_scheduled_tokens > 0
        for new in output.scheduled_new_reqs:
            if (tracked := self._requests.get(new.req_id)) is not None:
                tracked.cached_tokens = new.num_computed_tokens
            self._advance(plan, new.req_id, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for request_id, new_blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            tracked = self._requests.get(request_id)
            if tracked is None:
                continue
            if new_blocks is not None:
                fresh = list(new_blocks[0])
                tracked.block_ids = fresh if request_id in cached.resumed_req_ids else tracked.block_ids + fresh
            plan.decodes |= computed >= tracked.request.num_prompt_tokens
            self._advance(plan, request_id, computed, output)
        return plan

    def _advance(self, plan: StepPlan, request_id: str, computed: int, output: Any) -> None:
        tracked = self._requests.get(request_id)
        if tracked is None or tracked.no_save:
            return
        try:
            self._plan_saves(plan, tracked, computed, output)
        except Exception:  # noqa: BLE001 - the border to the engine: this request is not stored, and runs on
            tracked.no_save = True
            self._log.exception("storing failed request_id=%s", request_id)

    def _plan_saves(self, plan: StepPlan, tracked: Tracked, computed: int, output: Any) -> None:
        request_id = tracked.request.request_id
        # Only tokens that are final: drafted ones may be rejected, and a token sampled in a step that is still running has no id yet.
        known = min(computed + output.num_scheduled_tokens.get(request_id, 0), tracked.request.num_tokens)
        chunks = self._full_chunks(tracked, known) + self._tail_chunk(tracked, known)
        if chunks:
            plan.saves.append(SaveJob(request_id, chunks, tenant_tag(tracked.request.cache_salt or "")))
            tracked.outstanding += self._workers

    def _full_chunks(self, tracked: Tracked, known: int) -> list[ChunkSave]:
        count = known // self._chunk_tokens
        if count <= tracked.next_chunk:
            return []
        keys = tracked.chain.full(tracked.request.all_token_ids[: count * self._chunk_tokens])
        saves = [
            self._save(tracked, keys[i], keys[i - 1] if i else b"", i, self._chunk_tokens)
            for i in range(tracked.next_chunk, count)
        ]
        tracked.next_chunk = count
        return saves

    def _tail_chunk(self, tracked: Tracked, known: int) -> list[ChunkSave]:
        """The prompt's remainder, once, so that the whole prompt can be handed over."""
        length = tracked.request.num_prompt_tokens
        if tracked.tail_done or known < length:
            return []
        tracked.tail_done = True
        tokens = length % self._chunk_tokens
        if tokens < MIN_TOKENS:
            return []
        prompt = tracked.request.prompt_token_ids
        keys = tracked.chain.full(prompt)
        key = tracked.chain.tail(prompt)
        assert key is not None
        return [self._save(tracked, key, keys[-1] if keys else b"", length // self._chunk_tokens, tokens)]

    def _save(self, tracked: Tracked, key: bytes, parent: bytes, index: int, tokens: int) -> ChunkSave:
        size = self._layout.block_tokens
        start = index * self._chunk_tokens // size
        blocks = tracked.block_ids[start : start + -(-tokens // size)]
        if len(blocks) != -(-tokens // size):
            raise RuntimeError(f"{len(blocks)} blocks known for {tokens} tokens from block {start} on")
        return ChunkSave(key, parent, tokens, blocks)

    # ---- ending ----

    def finished(self, request: Any) -> bool:
        """Whether vLLM must keep the request's blocks until the workers have reported."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return False
        self._release_hit(tracked)
        tracked.finished = True
        keep = tracked.outstanding > 0
        if keep:
            self._awaiting.add(request.request_id)
        self._forget_if_done(request.request_id, tracked)
        return keep

    def handover(self, request: Any) -> dict[str, Any] | None:
        """What the answer of a prefill leg carries to the consumer; ask before finished()."""
        tracked = self._requests.get(request.request_id)
        asked = request.kv_transfer_params or {}
        if not asked.get("do_remote_decode") or request.status.name not in (
            "FINISHED_LENGTH_CAPPED",
            "FINISHED_STOPPED",
        ):
            return None
        stored = 0
        if tracked is not None and tracked.next_chunk:
            stored = min(tracked.next_chunk, request.num_prompt_tokens // self._chunk_tokens) * self._chunk_tokens
        if tracked is not None and tracked.tail_done and request.num_prompt_tokens - stored >= MIN_TOKENS:
            stored = request.num_prompt_tokens
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "pdserve.transfer_id": uuid.uuid4().hex,
            "pdserve.num_tokens": stored,
            "pdserve.source": self._instance,
            "pdserve.cached_tokens": tracked.cached_tokens if tracked is not None else 0,
            # Routers written for other connectors look at these.
            "remote_engine_id": self._instance,
            "remote_block_ids": [],
            "remote_host": None,
            "remote_port": None,
        }

    def reported(self, connector_output: Any) -> None:
        """The workers' report of a step."""
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            for request_id, count in report.saved.items():
                tracked = self._requests.get(request_id)
                if tracked is not None:
                    tracked.outstanding -= count
                    self._forget_if_done(request_id, tracked)
            for request_id, result in report.loaded.items():
                tracked = self._requests.get(request_id)
                if tracked is not None:
                    tracked.result = result if tracked.result is None else tracked.result.merged(result)
        for request_id in connector_output.finished_recving or ():  # all ranks are done with the arena's bytes
            tracked = self._requests.get(request_id)
            if tracked is not None and tracked.loading is not None:
                self._end_load(request_id, tracked)

    def _end_load(self, request_id: str, tracked: Tracked) -> None:
        assert tracked.loading is not None
        hit, tracked.loading = tracked.loading, None
        result, tracked.result = tracked.result or LoadResult(error="no worker reported"), None
        tokens = hit.end - tracked.loading_from
        if result.error:
            tracked.no_load = True
            tracked.next_chunk, tracked.tail_done = 0, False  # what is recomputed is offered again
            self._log.warning(
                "load failed (%s): %d tokens are recomputed request_id=%s", result.error, tokens, request_id
            )
        else:
            self._log.info(
                "retrieved %d of %d tokens from %s in %.1f ms request_id=%s",
                tokens,
                tracked.request.num_tokens,
                "+".join(dict.fromkeys(found.tier for found in hit.found)),
                result.seconds * 1000,
                request_id,
            )
        self._release(hit, result)
        self._forget_if_done(request_id, tracked)

    # ---- leases ----

    def _release_hit(self, tracked: Tracked) -> None:
        if tracked.hit is not None:
            hit, tracked.hit = tracked.hit, None
            self._release(hit)

    def _release(self, hit: Hit, result: LoadResult | None = None) -> None:
        if hit.daemon_id != self._client.daemon_id:
            return  # that daemon is gone, and the lease with it
        result = result or LoadResult()
        try:
            self._client.release(hit.lease, RPC_S, result.chunks, result.nbytes, result.corrupt)
        except CacheError as e:
            self._log.debug("lease not released, it ends by itself: %s", e)

    def _forget_if_done(self, request_id: str, tracked: Tracked) -> None:
        if tracked.finished and tracked.loading is None and tracked.outstanding <= 0:
            self._requests.pop(request_id, None)

    def close(self) -> None:
        self._client.close()

"""The scheduler's half: what is cached already, what to load and to store in this step, when blocks may go.

Runs inside vLLM's scheduler, so everything is bounded: one lookup a request, with a deadline, and a miss when in doubt.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from pdserve import log
from pdserve.chunk import ChunkLayout, KeyChain, root_key
from pdserve.engines.vllm.breakeven import BreakEven, Choice
from pdserve.engines.vllm.facts import LegFacts, Nobody, Teller
from pdserve.engines.vllm.finding import Finder, Mode
from pdserve.engines.vllm.first import told
from pdserve.engines.vllm.messages import ChunkExpected, ChunkLoad, LoadJob, LoadResult, StepPlan, WorkerReport
from pdserve.engines.vllm.naps import clock
from pdserve.engines.vllm.stats import EngineStats
from pdserve.engines.vllm.storing import Storing
from pdserve.engines.vllm.tracked import Hit, Tracked
from pdserve.errors import CacheError, UnsupportedError
from pdserve.transfer.client import CacheClient

#: tokens of a step that takes so long anyway that an answer's next token is not seen to wait for what is stored beside it
LONG_STEP = 2048


class SchedulerSide:
    """One per engine. `client` is its own connection to the daemon, used for lookups and releases only."""

    def __init__(
        self,
        client: CacheClient,
        layout: ChunkLayout,
        fingerprint: str,
        *,
        workers: int,
        instance: str,
        mode: Mode = "adaptive",
        patience: float = 1.0,
        teller: Teller | Nobody | None = None,
        max_model_len: int = 0,
        plain_chats: bool = False,
    ) -> None:
        self._max_model_len, self._plain_chats = max_model_len, plain_chats
        self._client, self._layout, self._fingerprint = client, layout, fingerprint
        self._workers, self._instance = workers, instance
        self._requests: dict[str, Tracked] = {}
        self._loads: list[LoadJob] = []
        self._awaiting: set[str] = set()
        self._dropped: set[str] = set()
        self._log = log.get("connector")
        self._chunk_tokens = 0
        self._breakeven = BreakEven()
        self._finder = Finder(client, layout, self._breakeven, mode, patience)
        self._storing = Storing(layout)
        self.stats = EngineStats(self._breakeven)
        self._facts = LegFacts(teller or Nobody(), fingerprint, layout, self._breakeven.saved)

    # ---- finding ----

    def arrived(self, request: Any) -> None:
        """A request has joined vLLM's queue."""
        tracked = self._track(request)
        if tracked is not None:
            self._finder.prefetch(tracked)

    def matched(self, request: Any, local: int) -> tuple[int | None, bool]:
        """Tokens beyond the engine's own `local` ones that can be loaded; None: ask again (a handover is under way, or chunks
        are coming up from a lower tier)."""
        tracked = self._track(request)
        if tracked is None or tracked.no_load or tracked.loading is not None:
            return 0, False
        tokens = self._finder.matched(tracked, local)
        return tokens, bool(tokens)

    def _track(self, request: Any) -> Tracked | None:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            # Prompt embeddings have no tokens to name them by; without a daemon there is nothing to find.
            if request.prompt_token_ids is None or not self._ready():
                return None
            media = [
                (str(f.identifier), f.mm_position.offset, f.mm_position.length)
                for f in getattr(request, "mm_features", None) or ()
            ]
            lora = request.lora_request
            root = root_key(
                f"{self._fingerprint}:{self._finder.generation}" if self._finder.generation else self._fingerprint,
                self._layout,
                f"{lora.lora_name}:{lora.lora_path}" if lora else "",
                request.cache_salt or "",
            )
            tracked = self._requests[request.request_id] = Tracked(request, KeyChain(root, self._chunk_tokens, media))
            self._finder.push(tracked)
        return tracked

    def _ready(self) -> bool:
        if self._chunk_tokens:
            return True
        try:
            self._client.connect(self._finder.lookup_s)
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
        self._chunk_tokens = self._finder.chunk_tokens = self._storing.chunk_tokens = chunk_tokens
        self.stats.token_bytes = self._layout.shard_bytes(chunk_tokens) * self._layout.shards / chunk_tokens

    # ---- loading ----

    def allocated(self, request: Any, block_ids: list[int], external: int) -> None:
        """vLLM has given the request its blocks; `external` tokens of them are ours to fill."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return
        tracked.block_ids = list(block_ids)
        self._facts.decided(tracked, tracked.hit, external)
        for choice in (tracked.choice, tracked.fetch_choice):
            if choice is not None:
                self.stats.decided(choice)
        tracked.choice = tracked.fetch_choice = None
        hit, tracked.hit = tracked.hit, None
        if hit is None:
            return
        tracked.handed_over |= hit.promised > 0
        self._storing.found(tracked, hit)
        if not external:
            self._finder.give_back(hit)
            return
        local = hit.reach - external
        tracked.loading, tracked.loading_from, tracked.loading_since = hit, local, time.monotonic()
        try:
            job = self._load_job(tracked, hit, local)
        except Exception:  # noqa: BLE001 - the request waits for a report now: of no daemon, this one fails, by its blocks
            self._log.exception("planning a load failed request_id=%s", request.request_id)
            blocks = ChunkExpected(b"", external, list(block_ids[local // self._layout.block_tokens :]))
            job = LoadJob(request.request_id, "", [], [blocks])
        self._loads.append(job)

    def _load_job(self, tracked: Tracked, hit: Hit, local: int) -> LoadJob:
        tokens = tracked.request.all_token_ids
        keys = tracked.chain.full(tokens)[hit.first_chunk :]
        if (tail := tracked.chain.tail(tokens)) is not None:
            keys = [*keys, tail]
        chunks, expected, start = [], [], hit.first_chunk * self._chunk_tokens
        for i, key in enumerate(keys):
            if start >= hit.reach:
                break
            found = hit.found[i] if i < len(hit.found) else None
            length = found.tokens if found else min(self._chunk_tokens, hit.reach - start)
            blocks = self._blocks(tracked, start, length, local)
            if found is None:
                expected.append(ChunkExpected(key, length, blocks))
            else:
                place = (found.offset, found.tokens, found.shard_bytes, found.stride, found.digests)
                chunks.append(ChunkLoad(key, *place, blocks))
            start += length
        return LoadJob(tracked.request.request_id, hit.daemon_id, chunks, expected, hit.stall_s)

    def _blocks(self, tracked: Tracked, start: int, tokens: int, local: int) -> list[int | None]:
        """The blocks of a chunk; None for those that the engine has already."""
        size = self._layout.block_tokens
        first, end = start // size, -(-(start + tokens) // size)
        known = min(max(local // size - first, 0), end - first)
        if end > len(tracked.block_ids):
            raise RuntimeError(f"{len(tracked.block_ids)} blocks known for tokens up to {start + tokens}")
        return [None] * known + tracked.block_ids[first + known : end]

    # ---- every step ----

    def plan(self, output: Any) -> StepPlan:
        """What the workers do in this step."""
        plan = StepPlan(loads=self._loads, awaiting=self._awaiting, preempted=set(output.preempted_req_ids or ()))
        plan.dropped, plan.idle = self._dropped, not output.total_num_scheduled_tokens
        self._loads, self._awaiting, self._dropped = [], set(), set()
        self._finder.busy = output.total_num_scheduled_tokens > 0
        if self._finder.busy:
            clock.computed()
        self._storing.recent.at_epoch(self._client.content)
        for request_id in plan.preempted:  # what of it was to be stored may not have been
            if (tracked := self._requests.get(request_id)) is not None:
                self._storing.forget(tracked)
        for new in output.scheduled_new_reqs:
            # vLLM's second model runner names a request that resumes after a preemption among the new ones.
            if (tracked := self._requests.get(new.req_id)) is not None and not tracked.scheduled:
                tracked.scheduled, tracked.cached_tokens = True, new.num_computed_tokens
                tracked.computing_since = time.monotonic()
                self._facts.scheduled(tracked, new.num_computed_tokens)
            self._advance(plan, new.req_id, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for request_id, new_blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            tracked = self._requests.get(request_id)
            if tracked is None:
                continue
            if new_blocks is not None:
                if request_id in cached.resumed_req_ids:
                    tracked.block_ids = []
                tracked.block_ids.extend(new_blocks[0])
            if computed >= tracked.request.num_prompt_tokens:
                plan.answers += output.total_num_scheduled_tokens < LONG_STEP
                if tracked.computing_since:
                    self._time_prefill(tracked)
            if computed + output.num_scheduled_tokens.get(request_id, 0) >= self._storing.due(tracked):
                self._advance(plan, request_id, computed, output)
        return plan

    def _advance(self, plan: StepPlan, request_id: str, computed: int, output: Any) -> None:
        tracked = self._requests.get(request_id)
        if tracked is None or tracked.no_save:
            return
        try:
            job = self._storing.job(tracked, computed, output.num_scheduled_tokens.get(request_id, 0))
        except Exception:  # noqa: BLE001 - the border to the engine: this request is not stored, and runs on
            tracked.no_save = True
            self._log.exception("storing failed request_id=%s", request_id)
            return
        if job is not None:
            plan.saves.append(job)
            tracked.outstanding += self._workers

    def _time_prefill(self, tracked: Tracked) -> None:
        """Once the first token is there: what computing the prompt took, with all that ran beside it."""
        request = tracked.request
        if not tracked.computing_since or request.num_tokens <= request.num_prompt_tokens:
            return
        seconds, tracked.computing_since = time.monotonic() - tracked.computing_since, 0.0
        computed = request.num_prompt_tokens - tracked.cached_tokens
        # A few tokens behind a hit say what a step costs, not what a prompt does.
        if computed >= self._chunk_tokens // 2:
            self._breakeven.computing.add(computed, seconds)

    # ---- ending ----

    def reset(self) -> None:
        """The engine forgets all KV, perhaps because its weights have changed: what is stored from now on is of another model."""
        self._finder.generation = uuid.uuid4().hex
        self._storing.recent.clear()
        for tracked in self._requests.values():
            tracked.no_load = tracked.no_save = True
            self._finder.release(tracked)
        self._log.warning(
            "the engine's cache was reset: until it is restarted it uses nothing that was stored before, and shares nothing with others"
        )

    def finished(self, request: Any) -> bool:
        """Whether vLLM must keep the request's blocks until the workers have reported."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return False
        self._time_prefill(tracked)
        self._finder.release(tracked)
        tracked.finished = True
        self._facts.finished(tracked)
        if tracked.loading is not None:
            self._dropped.add(request.request_id)
        # While it is loaded vLLM keeps its blocks until that has ended, and takes one report about a request, not two. What is
        # still being stored of it is then from before a preemption: of blocks that are its own no longer.
        keep = tracked.outstanding > 0 and tracked.loading is None
        if keep:
            self._awaiting.add(request.request_id)
        self._forget_if_done(request.request_id, tracked)
        if all(other.finished for other in self._requests.values()):
            self._finder.busy = False  # there may be no step any more that would say so
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
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "pdserve.transfer_id": uuid.uuid4().hex,
            "pdserve.num_tokens": self._storing.stored(tracked) if tracked is not None else 0,
            "pdserve.source": self._instance,
            "pdserve.cached_tokens": tracked.cached_tokens if tracked is not None else 0,
            **({"pdserve.generation": self._finder.generation} if self._finder.generation else {}),
            "pdserve.facts": self._facts.handed(tracked) if tracked is not None else None,
            **told(request, self._max_model_len, self._plain_chats),
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
        if connector_output.finished_recving:
            clock.ended()
        for request_id in connector_output.finished_recving or ():  # all ranks are done with the arena's bytes
            tracked = self._requests.get(request_id)
            if tracked is not None and tracked.loading is not None:
                self._end_load(request_id, tracked)

    def _end_load(self, request_id: str, tracked: Tracked) -> None:
        assert tracked.loading is not None
        hit, tracked.loading = tracked.loading, None
        result, tracked.result = tracked.result or LoadResult(error="no worker reported"), None
        end = min(hit.reach, hit.first_chunk * self._chunk_tokens + result.filled * self._chunk_tokens)
        tokens = max(0, (hit.reach if not result.error else end) - tracked.loading_from)
        tiers = [found.tier for found in hit.found][: result.filled] + result.late
        self._facts.loaded(tracked, hit, result, tokens, tiers, time.monotonic() - tracked.loading_since)
        if result.error:
            tracked.no_load = True
            # What is recomputed is offered again.
            tracked.next_chunk, tracked.tail_done = min(tracked.next_chunk, end // self._chunk_tokens), False
            self._storing.forget(tracked)
            missing = hit.reach - tracked.loading_from - tokens
            if not tracked.finished:
                self._log.warning(
                    "load failed (%s): %d tokens are recomputed request_id=%s", result.error, missing, request_id
                )
            self.stats.decided(Choice(False, "failed"))
        if tokens:
            self._log.info(
                "retrieved %d of %d tokens from %s in %.1f ms request_id=%s",
                tokens,
                tracked.request.num_tokens,
                "+".join(dict.fromkeys(tiers)),
                result.seconds * 1000,
                request_id,
            )
            seconds = time.monotonic() - tracked.loading_since
            if not hit.promised:
                self._breakeven.loading.add(tokens, seconds)
            # A handover's time is its producer's.
            self.stats.loaded(tiers, tokens, seconds if not hit.promised else None)
        self._finder.give_back(hit, result.chunks, result.nbytes, result.corrupt)
        self._forget_if_done(request_id, tracked)

    def _forget_if_done(self, request_id: str, tracked: Tracked) -> None:
        if tracked.finished and tracked.loading is None and tracked.outstanding <= 0:
            self._requests.pop(request_id, None)

    def close(self) -> None:
        self._facts.close()
        self._client.close()

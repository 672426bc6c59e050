"""Which chunks of a request are stored after a step. Pure, but for the clock."""

from __future__ import annotations

import time
from typing import Any

from pdserve.chunk import ChunkLayout, tenant_tag
from pdserve.engines.vllm import finding
from pdserve.engines.vllm.messages import ChunkSave, SaveJob
from pdserve.engines.vllm.recent import Recent
from pdserve.engines.vllm.tracked import Hit, Tracked


class Storing:
    """One per engine."""

    def __init__(self, layout: ChunkLayout) -> None:
        self._layout = layout
        self.recent = Recent()
        self.chunk_tokens = 0

    def found(self, tracked: Tracked, hit: Hit) -> None:
        """What the lookup found need not be stored again. (What lies before it, in the engine's own cache, may be offered
        again: the daemon may have lost it, and takes it only then.)"""
        if hit.first_chunk == 0:
            tracked.next_chunk = max(tracked.next_chunk, hit.reach // self.chunk_tokens)
        if hit.reach == tracked.request.num_prompt_tokens:
            tracked.tail_done = True

    def forget(self, tracked: Tracked) -> None:
        """What of this request was offered may not have been stored, or not well: it is offered again."""
        keys = tracked.chain.full(tracked.request.all_token_ids)
        tail = tracked.chain.tail(tracked.request.prompt_token_ids)
        self.recent.forget(keys if tail is None else [*keys, tail])

    def due(self, tracked: Tracked) -> int:
        """Before it has so many tokens, nothing of the request is to be stored: asked of each request in each step."""
        full: int = (tracked.next_chunk + 1) * self.chunk_tokens
        return full if tracked.tail_done else min(full, tracked.request.num_prompt_tokens)

    def job(self, tracked: Tracked, computed: int, scheduled: int) -> SaveJob | None:
        """What is complete once this step, of `scheduled` tokens behind `computed` ones, has run."""
        # Only tokens that are final: drafted ones may be rejected, and a token sampled in a step that is still running has no id yet.
        known = min(computed + scheduled, tracked.request.num_tokens)
        chunks = self._full_chunks(tracked, known) + self._tail_chunk(tracked, known)
        if not chunks:
            return None
        return SaveJob(tracked.request.request_id, chunks, tenant_tag(tracked.request.cache_salt or ""))

    def stored(self, tracked: Tracked) -> int:
        """Tokens of the prompt, from its start, that are stored or being stored."""
        length = tracked.request.num_prompt_tokens
        stored = min(tracked.next_chunk, length // self.chunk_tokens) * self.chunk_tokens
        if tracked.tail_done and length - stored >= finding.MIN_TOKENS:
            return int(length)
        return stored

    def _full_chunks(self, tracked: Tracked, known: int) -> list[ChunkSave]:
        count = known // self.chunk_tokens
        if count <= tracked.next_chunk:
            return []
        keys = tracked.chain.full(tracked.request.all_token_ids[: count * self.chunk_tokens])
        now = time.monotonic()
        # What is handed over must be there for certain: a producer offers all of it.
        offered = not _is_prefill_leg(tracked.request)
        saves = []
        for i in range(tracked.next_chunk, count):
            if not (offered and self.recent.has(keys[i], now)):
                saves.append(self._save(tracked, keys[i], keys[i - 1] if i else b"", i, self.chunk_tokens))
            self.recent.add(keys[i], now)
        tracked.next_chunk = count
        return saves

    def _tail_chunk(self, tracked: Tracked, known: int) -> list[ChunkSave]:
        """The prompt's remainder, once, so that the whole prompt can be handed over."""
        length = tracked.request.num_prompt_tokens
        if tracked.tail_done or known < length:
            return []
        tracked.tail_done = True
        tokens = length % self.chunk_tokens
        if tokens < finding.MIN_TOKENS:
            return []
        prompt = tracked.request.prompt_token_ids
        keys = tracked.chain.full(prompt)
        key = tracked.chain.tail(prompt)
        assert key is not None
        now = time.monotonic()
        if self.recent.has(key, now) and not _is_prefill_leg(tracked.request):
            return []
        self.recent.add(key, now)
        return [self._save(tracked, key, keys[-1] if keys else b"", length // self.chunk_tokens, tokens)]

    def _save(self, tracked: Tracked, key: bytes, parent: bytes, index: int, tokens: int) -> ChunkSave:
        size = self._layout.block_tokens
        start = index * self.chunk_tokens // size
        blocks = tracked.block_ids[start : start + -(-tokens // size)]
        if len(blocks) != -(-tokens // size):
            raise RuntimeError(f"{len(blocks)} blocks known for {tokens} tokens from block {start} on")
        return ChunkSave(key, parent, tokens, blocks)


def _is_prefill_leg(request: Any) -> bool:
    return bool((request.kv_transfer_params or {}).get("do_remote_decode"))

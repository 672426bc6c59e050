"""Who holds blocks of an engine's cache without running: what a reset with reset_running_requests does not take them from. Pure.

vLLM then preempts what runs, and refuses if a block is still held. Requests that hold some all the same, all vLLM's own doing:
- one that waits for its load, and one that ended in it: its blocks are being written to;
- one that ended, while what it computed is being stored;
- one whose load has ended, and for whose other tokens there are no blocks free (or no room in the step): it is back among those that
  wait (WAITING; PREEMPTED if it ran before), and keeps what was loaded until it runs. Running requests may take a while to leave room.
Each of these ends with further steps. Blocks that none of the scheduler's requests has are lost.
"""

from __future__ import annotations

from typing import Any


def waiting(scheduler: Any) -> dict[str, str]:
    """{request: its state, and what it holds}, of those that hold blocks and do not run."""
    running, found = {request.request_id for request in scheduler.running}, {}
    for request_id, request in scheduler.requests.items():
        count = len(_blocks(scheduler, request_id))
        if count and request_id not in running:
            computed = f"{request.num_computed_tokens} of {request.num_tokens} tokens"
            found[request_id] = f"{request.status.name}, {count} blocks, {computed}"
    return found


def held(scheduler: Any) -> dict[str, str]:
    """waiting(), and blocks that are held by no request."""
    found, pool = waiting(scheduler), scheduler.kv_cache_manager.block_pool
    known = {i for request_id in scheduler.requests for i in _blocks(scheduler, request_id)}
    deferred = {block.block_id for _, blocks in scheduler.deferred_frees for block in blocks}
    lost = {b.block_id for b in pool.blocks if b.ref_cnt and not b.is_null} - known - deferred
    if deferred:
        found["a step that is under way"] = f"{len(deferred)} blocks"
    if lost:
        found["nobody"] = f"{len(lost)} blocks"
    return found


def _blocks(scheduler: Any, request_id: str) -> set[int]:
    return {i for group in scheduler.kv_cache_manager.get_block_ids(request_id) for i in group}

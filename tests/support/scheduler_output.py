"""What vLLM's scheduler tells its connector of a step, as far as the connector looks at it."""

import types


def step(scheduled, new=(), cached=(), preempted=(), resumed=()):
    """new: (request id, tokens computed before); cached: (request id, new block ids, tokens computed before)."""
    running = types.SimpleNamespace(
        req_ids=[c[0] for c in cached],
        new_block_ids=[c[1] for c in cached],
        num_computed_tokens=[c[2] for c in cached],
        resumed_req_ids=set(resumed),
    )
    return types.SimpleNamespace(
        preempted_req_ids=set(preempted),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        scheduled_new_reqs=[types.SimpleNamespace(req_id=r, num_computed_tokens=n) for r, n in new],
        scheduled_cached_reqs=running,
    )

"""What records and facts cost: on the proxy's loop, on the scheduler's thread of an engine, on the thread that tells.

.venv/bin/python tests/bench/bench_records.py
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from pdserve import marks
from pdserve.chunk import ChunkLayout, KeyChain
from pdserve.engines.vllm.facts import LegFacts, Nobody
from pdserve.proxy.history import History
from pdserve.proxy.lifetime import Event, Lifetime
from pdserve.proxy.trail import Trail

LAYOUT = ChunkLayout(kind="opaque-block", kv_dtype="f", layers=1, block_tokens=16, block_bytes=64, shards=1)
ROUNDS = 5


def best(work: Callable[[list[Any]], None], make: Callable[[], Any], count: int) -> float:
    """Microseconds for each, of the best of some rounds."""
    found = []
    for _ in range(ROUNDS):
        things = [make() for _ in range(count)]
        began = time.perf_counter()
        work(things)
        found.append((time.perf_counter() - began) / count * 1e6)
    return min(found)


def exchange() -> Any:
    client = SimpleNamespace(lifetime=Lifetime(), arrived=time.perf_counter(), status=200)
    return SimpleNamespace(
        request_id="0123456789abcdef", client=client, endpoint="/v1/completions", model="m", error="", key=SimpleNamespace(name="k"),
        facts=SimpleNamespace(session=""), route="pd", reason="", prefill="p", decode="d", trace_id="", trail=Trail(),
        headers=[(b"host", b"x")] * 8,
    )  # fmt: skip


def one_request(history: History, one: Any) -> None:
    history.begin(one)
    on, trail = one.client.lifetime.on, one.trail
    on(Event.SPLIT)
    trail.leg("prefill", "p")
    trail.done()
    on(Event.DECODE)
    trail.leg("decode", "d")
    on(Event.FIRST_BYTE)
    on(Event.END)
    history.end(one)


def tracked(tokens: list[int]) -> Any:
    request = SimpleNamespace(
        request_id=f"cmpl-{random.random()}-0-0123abcd", prompt_token_ids=tokens, all_token_ids=tokens, num_tokens=len(tokens),
        num_prompt_tokens=len(tokens), lora_request=None, cache_salt=None, arrival_time=time.time(), trace_headers=None,
        kv_transfer_params=None, status=SimpleNamespace(name="FINISHED_STOPPED"),
    )  # fmt: skip
    chain = KeyChain(b"r" * 32, 256)
    chain.full(tokens)
    return SimpleNamespace(
        request=request, chain=chain, choice=None, handover=None, fetch=None, loading_from=0, cached_tokens=0
    )


def main() -> None:
    history = History()
    took = best(lambda things: [one_request(history, one) for one in things] and None, exchange, 2000)
    print(f"proxy: {took:.1f} us a request for its states, legs and record")
    for count in (1000, 8000, 32000):
        tokens = [random.randrange(50000) for _ in range(count)]
        legs = LegFacts(Nobody(), "m", LAYOUT, lambda *_: 0.1)

        def tell(things: list[Any], legs: LegFacts = legs) -> None:
            for one in things:
                legs.decided(one, None, 0)
                legs.scheduled(one, 0)
                legs.finished(one)

        took = best(tell, lambda tokens=tokens: tracked(tokens), 100)  # type: ignore[misc]
        thread = best(lambda things: [marks.make(t, 256, 1) for t in things] and None, lambda tokens=tokens: tokens, 10)  # type: ignore[misc]
        print(
            f"engine, {count} tokens: {took:.1f} us a request in the scheduler, {thread:.0f} us on the thread that tells"
        )


if __name__ == "__main__":
    main()

"""One engine of both roles whose own KV space is small: chunked prefill, preemption, hits after its cache forgot."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx

from pdserve.compare import TOP_LOGPROBS, Rule, compare

from .conftest import wait_for

if TYPE_CHECKING:
    from .conftest import Deployment

BATCHED = Rule(exact=False, tolerance=0.005)


def test_prompt_of_three_prefill_steps_is_stored_and_hit(both: Deployment) -> None:
    prompt = both.ids(1300)
    expected = both.reference(prompt, max_tokens=10)
    cold = both.client.complete(prompt, max_tokens=10)
    both.wait_idle()
    both.forget()
    before = both.retrieved("both")
    warm = both.client.complete(prompt, max_tokens=10)
    assert cold.token_ids == warm.token_ids == expected.token_ids
    assert both.retrieved("both") - before >= 1280
    both.wait_idle()


def test_headers_say_what_an_engine_had_that_answers_alone(both: Deployment) -> None:
    prompt = [*both.ids(700)]
    body = {"model": both.client.model, "prompt": prompt, "max_tokens": 2, "temperature": 0}

    def told(stream: bool) -> dict[str, str]:
        both.forget()
        reply = httpx.post(f"{both.target.url}/v1/completions", json=body | {"stream": stream}, timeout=120)
        assert (reply.status_code, reply.headers["x-pdserve-route"]) == (200, "local")
        return dict(reply.headers)

    told(stream=False)
    both.wait_idle()
    for stream in (False, True):
        # Told in passing, one step before the first token: on a machine that is very busy it may come too late for one.
        wait_for(lambda s=stream: "dram=700" in told(s).get("x-pdserve-cached-tokens", ""), 120, "a hit, told in time")
    both.wait_idle()


def test_preempted_requests_give_the_same_tokens(both: Deployment) -> None:
    prompts = [both.ids(300) for _ in range(8)]
    options = {"max_tokens": 200, "logprobs": TOP_LOGPROBS, "ignore_eos": True}
    preempted = both.metric("both", "vllm:num_preemptions_total")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda p: both.client.complete(p, **options), prompts))
        expected = list(pool.map(lambda p: both.plain.complete(p, **options), prompts))
    assert both.metric("both", "vllm:num_preemptions_total") > preempted, (
        "nothing was preempted: the test tests nothing"
    )
    for reference, answer in zip(expected, answers, strict=True):
        assert answer.completion_tokens == 200
        assert not compare(reference, answer, BATCHED).reason
    both.wait_idle()


def test_what_the_engine_evicted_comes_back_from_the_cache(both: Deployment) -> None:
    prompts = [both.ids(900) for _ in range(4)]  # together more than the engine's 24 blocks
    first = [both.client.complete(p, max_tokens=6).token_ids for p in prompts]
    both.wait_idle()
    before = both.retrieved("both")
    again = [both.client.complete(p, max_tokens=6).token_ids for p in prompts]
    assert again == first
    assert both.retrieved("both") > before
    both.wait_idle()

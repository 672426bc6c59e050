"""The answers through pdserve are those of plain vLLM, and repeated prompts come out of the cache."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from pdserve.compare import TOP_LOGPROBS, Rule, compare
from pdserve.prompts import LENGTHS, SHARED_PREFIX

from .conftest import run_pdserve

if TYPE_CHECKING:
    from .conftest import Deployment

# Batches of other sizes move float32 log-probabilities by about 1e-5; a tie closer than this may flip.
BATCHED = Rule(exact=False, tolerance=0.005)


@pytest.mark.timeout(600)
def test_verify_finds_no_difference(pd: Deployment) -> None:
    """All of verify's prompts: 1 to 3000 tokens, shared prefixes, unicode, chats; cold and warm; exact tokens."""
    done = run_pdserve("verify", pd.top.name, "--json", timeout=500)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    problems = [*report["problems"], *(f"{r['case']}: {p}" for r in report["results"] for p in r["problems"])]
    assert done.returncode == 0, "\n".join([f"seed {report['seed']}", *problems, done.stderr])
    assert report["ok"]
    assert report["rule"] == "greedy tokens equal"
    assert report["caches_emptied"]
    assert [r["prompt_tokens"] for r in report["results"]][: len(LENGTHS)] == list(LENGTHS)
    for r in report["results"]:
        assert r["cold"]["tokens_equal"], r["case"]
        assert r["warm"]["tokens_equal"], r["case"]
    assert report["cache"]["loaded_chunks"] > 0
    assert report["cache"]["digest_failures"] == 0


def test_prefix_of_300_tokens_is_shared_between_prompts(pd: Deployment) -> None:
    prefix = pd.ids(SHARED_PREFIX)
    first, second = prefix + pd.ids(100), prefix + pd.ids(90)
    expected = pd.reference(second, max_tokens=12)
    pd.client.complete(first, max_tokens=2)
    pd.wait_idle()
    pd.forget()
    before = pd.retrieved("prefill")
    answer = pd.client.complete(second, max_tokens=12)
    assert answer.token_ids == expected.token_ids
    # The producer computed only what the prompts do not share: one whole chunk came out of the cache.
    assert pd.retrieved("prefill") - before >= 256


def test_eight_different_prompts_at_once(pd: Deployment) -> None:
    prompts = [pd.ids(120 + 60 * n) for n in range(8)]
    options = {"max_tokens": 12, "logprobs": TOP_LOGPROBS}
    expected = [pd.reference(prompt, **options) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        cold = list(pool.map(lambda p: pd.client.complete(p, **options), prompts))
    pd.wait_idle()
    pd.forget()
    with ThreadPoolExecutor(8) as pool:
        warm = list(pool.map(lambda p: pd.client.complete(p, **options), prompts))
    for reference, first, second in zip(expected, cold, warm, strict=True):
        assert not compare(reference, first, BATCHED).reason
        assert not compare(reference, second, BATCHED).reason
    pd.wait_idle()


def test_streamed_and_whole_answers_are_the_same(pd: Deployment) -> None:
    prompt = pd.ids(200)
    streamed = pd.client.complete(prompt, max_tokens=8)
    whole = pd.client.complete(prompt, max_tokens=8, stream=False)
    assert whole.token_ids == streamed.token_ids
    assert whole.text == streamed.text
    assert whole.finish_reason == streamed.finish_reason == "length"
    assert whole.prompt_tokens == streamed.prompt_tokens == 200


def test_answer_tells_its_route_and_request_id(pd: Deployment) -> None:
    answer = pd.client.complete(pd.ids(40), max_tokens=2, request_id="e2e-route-1")
    assert answer.headers["x-request-id"] == "e2e-route-1"
    assert answer.headers["x-pdserve-route"] == "pd"
    assert answer.headers["x-pdserve-prefill"] == "prefill-0"
    assert answer.headers["x-pdserve-decode"] == "decode-0"


def test_official_client_streams_a_chat(pd: Deployment) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{pd.client.url}/v1", api_key="none", timeout=60, max_retries=0) as client:
        stream = client.chat.completions.create(
            model=pd.client.model,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=12,
            temperature=0,
            stream=True,
        )
        text = "".join(event.choices[0].delta.content or "" for event in stream if event.choices)
    assert "Paris" in text

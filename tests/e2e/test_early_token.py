"""The producer's own first token, on real engines: a proxy of its own before the running deployment's producer and consumer.

float32: with temperature 0 the stream must say what plain vLLM's says. With sampling both engines draw, and nearly always
another token; then the answer must be one text all the same, also where the first token is a part of a character.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from pdserve.openai_client import Client, total

from .conformance_rows import SAY, TEXT
from .conftest import proxy_before

if TYPE_CHECKING:
    from .conftest import Deployment

USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
def proxy(pd: Deployment, tmp_path: Path) -> Iterator[Client]:
    roles = [word for role in ("prefill", "decode") for word in (f"--{role}", pd.target.engines[role][0])]
    with proxy_before(pd, tmp_path, "--early-decode", "--early-token", *roles) as client:
        yield client


def stream(client: Client, body: dict[str, Any]) -> tuple[bool, list[Any]]:
    """Whether the first token was handed on, and the events, each checked."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    with httpx.Client(timeout=240, trust_env=False) as http:
        reply = http.post(client.url + path, json={"model": client.model, **body})
    assert reply.status_code == 200, reply.text
    pieces = reply.text.split("\n\n")
    assert pieces[-2:] == ["data: [DONE]", ""]
    events = [json.loads(piece.removeprefix("data: ")) for piece in pieces[:-2]]
    assert len({(event["id"], event["created"]) for event in events}) == 1, events
    assert sum(bool(choice["finish_reason"]) for event in events for choice in event["choices"]) == 1
    return "x-pdserve-first-token" in reply.headers, events


def summed(events: list[Any]) -> dict[str, Any]:
    choices = [choice for event in events for choice in event["choices"]]
    deltas = [choice.get("delta") or {} for choice in choices]
    used = events[-1].get("usage") or {}
    return {
        "text": "".join(c.get("text") or d.get("content") or "" for c, d in zip(choices, deltas, strict=True)),
        "ids": [token for choice in choices for token in choice.get("token_ids") or ()],
        "prompt": [c.get("prompt_token_ids") or e.get("prompt_token_ids") for e in events for c in e["choices"]][:1],
        "roles": [delta["role"] for delta in deltas if delta.get("role")],
        "end": [(c["finish_reason"], c.get("stop_reason")) for c in choices if c["finish_reason"]],
        "usage": {name: used.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
        "keys": [sorted(event) for event in events[:2]] + [sorted(choice) for choice in choices[:2]],
    }


def test_what_is_greedy_is_what_plain_vllm_says(pd: Deployment, proxy: Client) -> None:
    greedy = {**USAGE, "temperature": 0, "max_tokens": 16}
    for body in (
        {**greedy, "prompt": list(pd.ids(700))},
        {**greedy, "prompt": list(pd.ids(300)), "return_token_ids": True},
        {**greedy, "prompt": TEXT, "stop": ["market", "never so"]},
        {**greedy, "messages": SAY},
        {**greedy, "messages": SAY, "return_token_ids": True},
    ):
        assert pd.plain.reset_prefix_cache()
        (_, plain), (handed_on, ours) = stream(pd.plain, body), stream(proxy, body)
        assert summed(ours) == summed(plain)
        assert handed_on or not summed(plain)["text"]
    assert total(proxy.metrics(), "pdserve_first_tokens_total", outcome="confirmed") >= 3
    assert total(proxy.metrics(), "pdserve_first_tokens_total", outcome="unanswered") == 0


def test_what_is_sampled_is_one_text(pd: Deployment, proxy: Client) -> None:
    """Both engines draw one of two tokens, one of which is the first part of a character. What the client was told is one text
    whatever they drew: the characters of its tokens, but for a part that is still open at the end."""
    half, whole = tokens_of(pd, " \N{SMILING FACE WITH SMILING EYES}")[0], tokens_of(pd, " and")[0]
    assert text_of(pd, [half]).endswith("\ufffd")
    sampled = {**USAGE, "temperature": 2.0, "max_tokens": 8, "ignore_eos": True, "allowed_token_ids": [half, whole]}
    before = proxy.metrics()
    for n in range(16):
        extra = ({}, {"stop": ["no such thing"], "include_stop_str_in_output": True})[n % 2]
        toss = "".join(random.Random(n).choices([" and", " \N{SMILING FACE WITH SMILING EYES}"], k=60))  # neither is the likelier
        handed_on, events = stream(proxy, {**sampled, **extra, "prompt": toss, "return_token_ids": True})
        assert handed_on
        got = summed(events)
        ids = got["ids"]
        assert len(ids) == got["usage"]["completion_tokens"] == 8
        while ids and ids[-1] == half:
            ids.pop()
        assert got["text"] == (text_of(pd, ids) if ids else ""), got
    counts = {name: total(proxy.metrics(), "pdserve_first_tokens_total", outcome=name) for name in ("confirmed", "differed")}
    assert sum(counts.values()) == 16 + total(before, "pdserve_first_tokens_total")
    assert counts["differed"] >= 1, counts  # sixteen times two equal throws of a coin: never


def test_the_sdk_reads_it(pd: Deployment, proxy: Client) -> None:
    client = openai.OpenAI(base_url=proxy.url + "/v1", api_key="none", timeout=240, max_retries=0)
    with client:
        for temperature in (0.0, 1.5):
            chunks = list(client.chat.completions.create(
                model=pd.client.model, messages=SAY, max_tokens=12, temperature=temperature, stream=True,
                stream_options={"include_usage": True},
            ))  # type: ignore[call-overload]  # fmt: skip
            assert chunks[0].choices[0].delta.role == "assistant"
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
            assert chunks[-1].usage.completion_tokens <= 12
    pd.wait_idle()


def tokens_of(pd: Deployment, text: str) -> list[int]:
    with httpx.Client(timeout=240, trust_env=False) as http:
        asked = {"model": pd.client.model, "prompt": text, "add_special_tokens": False}
        found: list[int] = http.post(f"{pd.plain.url}/tokenize", json=asked).json()["tokens"]
    return found


def text_of(pd: Deployment, ids: list[int]) -> str:
    with httpx.Client(timeout=240, trust_env=False) as http:
        asked = {"model": pd.client.model, "tokens": ids}
        said: str = http.post(f"{pd.plain.url}/detokenize", json=asked).json()["prompt"]
    return said

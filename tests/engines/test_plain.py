"""What is asked of another engine to go on with a plain chat of /v1/messages or /v1/responses, and which chats are not plain."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pdserve.engines.body import Body
from pdserve.engines.vllm import plain

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
SAY = [{"role": "user", "content": "Hm?"}]


def body(**fields: Any) -> Body:
    return Body(json.dumps(fields).encode())


def chat(endpoint: str, **fields: Any) -> Any:
    asked = plain.questions(endpoint, body(**fields), "So far")
    return None if asked is None else json.loads(asked[0][1])["messages"]


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"messages": SAY}, SAY),
        ({"messages": SAY, "system": "Be brief."}, [{"role": "system", "content": "Be brief."}, *SAY]),
        ({"messages": SAY, "system": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
         [{"role": "system", "content": "ab"}, *SAY]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "one"}]}]}, [{"role": "user", "content": "one"}]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]}]},
         [{"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]}]),
        ({"messages": [*SAY, {"role": "assistant", "content": "Ha."}, *SAY], "tools": [], "metadata": {"user_id": "u"}},
         [*SAY, {"role": "assistant", "content": "Ha."}, *SAY]),
        ({"messages": [*SAY, {"role": "assistant", "content": "Ha"}]}, None),  # a beginning of the answer
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]}, None),
        ({"messages": [{"role": "system", "content": "x"}, *SAY]}, None),
        ({"messages": SAY, "system": "x-anthropic-billing-header: y"}, None),
        ({"messages": SAY, "tools": [{"name": "f"}]}, None),
        ({"messages": SAY, "thinking": {"type": "enabled"}}, None),
        ({"messages": SAY, "not_a_field": 1}, None),
        ({"messages": 5}, None),
        ({"messages": [5]}, None),
        ({"messages": []}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_messages(fields: dict[str, Any], messages: Any) -> None:
    assert chat(MESSAGES, model="m", max_tokens=5, **fields) == messages


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"input": "Hm?"}, SAY),
        ({"input": "Hm?", "instructions": "Be brief."}, [{"role": "system", "content": "Be brief."}, *SAY]),
        ({"input": SAY, "store": True, "user": "u", "top_logprobs": 0}, SAY),
        ({"input": [{"type": "message", **SAY[0]}]}, SAY),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]},
         [{"role": "user", "content": [{"type": "text", "text": "a"}]}]),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, None),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, None),
        ({"input": [*SAY, {"type": "message", "role": "assistant", "status": "in_progress", "content": "H"}]}, None),
        ({"input": "Hm?", "previous_response_id": "r"}, None),
        ({"input": "Hm?", "reasoning": {"effort": "low"}}, None),
        ({"input": "Hm?", "seed": 3}, None),  # asked again, since it gives the same
        ({"input": "Hm?", "text": {"format": {"type": "json_object"}}}, None),
        ({"input": 5}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_responses(fields: dict[str, Any], messages: Any) -> None:
    assert chat(RESPONSES, model="m", **fields) == messages


def test_what_is_asked() -> None:
    prompt, so_far = plain.questions(MESSAGES, body(model="m", messages=SAY, max_tokens=5), "So far") or ((), ())
    assert prompt[0] == so_far[0] == b"/tokenize"
    assert json.loads(prompt[1]) == {"model": "m", "messages": SAY, "add_generation_prompt": True}
    assert json.loads(so_far[1]) == {"model": "m", "prompt": "So far", "add_special_tokens": False}
    assert plain.tokens(b'{"count": 2, "tokens": [5, 6]}') == [5, 6]
    assert plain.tokens(b'{"error": {}}') is None
    assert plain.tokens(b"{") is None


def test_the_answers_fields_go_along_in_a_completions_words() -> None:
    made = plain.completion(MESSAGES, body(model="m", messages=SAY, max_tokens=5, stop_sequences=["x"], top_k=3, cache_salt="s"))
    assert made is not None
    assert json.loads(made.raw) == {"model": "m", "max_tokens": 5, "stop": ["x"], "top_k": 3, "cache_salt": "s"}
    made = plain.completion(RESPONSES, body(model="m", input="Hm?", temperature=0.5, ignore_eos=True))
    assert made is not None
    assert json.loads(made.raw) == {"model": "m", "max_tokens": None, "temperature": 0.5, "ignore_eos": True}

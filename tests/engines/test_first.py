from __future__ import annotations

import json
import types
from typing import Any

import pytest

from pdserve.engines.body import Body
from pdserve.engines.vllm import dialect, first

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USAGE = {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1}


def body(**fields: Any) -> Body:
    return Body(json.dumps({"model": "m", "stream": True, **fields}).encode())


def reply(chat: bool = False, text: str | None = "Hi", finish: str = "length", **more: Any) -> bytes:
    said = {"message": {"role": "assistant", "content": text, **more}} if chat else {"text": text, **more}
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish, "stop_reason": None, "token_ids": None}
    made = {"id": "cmpl-1", "object": "x", "created": 4, "model": "m", "choices": [choice], "usage": USAGE}
    return json.dumps(made).encode()


def handover(token: int = 5, room: int = 100, chat: bool = True) -> bytes:
    return json.dumps({"do_remote_prefill": True, "pdserve.first": {"token": token, "room": room, "chat": chat}}).encode()


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"temperature": 0}, {"temperature": 1.3, "top_p": 0.9, "top_k": 5, "min_p": 0.1}, {"max_tokens": 2}, {"max_tokens": None},
        {"stop": ["a", "bc"]}, {"stop_token_ids": [4]}, {"repetition_penalty": 1.2}, {"logit_bias": {"5": 3}}, {"n": 1},
        {"stream_options": {"include_usage": True}}, {"return_token_ids": True}, {"min_tokens": 0}, {"echo": False}, {"user": "u"},
    ],
)  # fmt: skip
def test_plain_text_may_begin_with_a_producers_token(fields: dict[str, Any]) -> None:
    assert dialect.may_begin(COMPLETIONS, body(prompt="a", **fields))
    assert dialect.may_begin(CHAT, body(messages=[{"role": "user", "content": "a"}], **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 1}, {"max_tokens": 0}, {"max_tokens": -3}, {"max_tokens": True}, {"max_tokens": "8"}, {"max_tokens": 2.0},
        {"min_tokens": 1}, {"min_tokens": "x"}, {"seed": 1}, {"logprobs": 0}, {"logprobs": 2}, {"n": 2}, {"n": True}, {"best_of": 2},
        {"echo": True}, {"presence_penalty": 0.1}, {"frequency_penalty": 1}, {"bad_words": ["a"]}, {"prompt_logprobs": 1},
        {"stream_options": {"continuous_usage_stats": True}}, {"stream_options": 3}, {"stream_options": {"include_usage": 1}},
        {"return_token_ids": 1}, {"response_format": {"type": "json_object"}}, {"structured_outputs": {"regex": "a"}},
        {"of_the_future": 1}, {"prompt": ["a", "b"]}, {"use_beam_search": True},
    ],
)  # fmt: skip
def test_what_a_consumer_would_refuse_or_say_otherwise_may_not(fields: dict[str, Any]) -> None:
    assert not dialect.may_begin(COMPLETIONS, body(**({"prompt": "a"} | fields)))


def test_false_is_no_wish_for_logprobs_in_a_chat_only() -> None:
    assert dialect.may_begin(CHAT, body(messages=[], logprobs=False))
    assert not dialect.may_begin(COMPLETIONS, body(prompt="a", logprobs=False))
    assert not dialect.may_begin(CHAT, body(messages=[{"role": "user", "content": [{"type": "image_url"}]}]))


@pytest.mark.parametrize("chat", [False, True])
def test_the_events_are_those_of_a_stream(chat: bool) -> None:
    asked = body(stop=["never"], stream_options={"include_usage": True})
    found = dialect.first(CHAT if chat else COMPLETIONS, asked, reply(chat, "Hi there"), handover())
    assert found is not None
    assert (found.token, found.shown, found.hidden, found.over) == (5, "Hi t", "here", False)
    events = [json.loads(piece[6:]) for piece in found.events.split(b"\n\n")[:-1]]
    assert [event["choices"][0].get("token_ids") for event in events] == ([None, [5]] if chat else [[5]])
    assert {event["object"] for event in events} == {"chat.completion.chunk" if chat else "text_completion"}
    assert dialect.hide_ids(found.events).count(b"[5]") == 0


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_chance_binds_whatever_it_draws_and_greed_leaves_it_to_the_consumer(chat: bool, finish: str) -> None:
    path = CHAT if chat else COMPLETIONS
    assert dialect.first(path, body(temperature=0), reply(chat, "", finish), handover()) is None
    found = dialect.first(path, body(stream_options={"include_usage": True}), reply(chat, "", finish), handover())
    assert found is not None
    assert found.over == (finish == "stop")
    assert found.events.endswith(b"data: [DONE]\n\n") == found.over
    assert (json.dumps(USAGE, separators=(",", ":")).encode() in found.events) == found.over


@pytest.mark.parametrize(
    ("asked", "said", "told"),
    [
        ({}, reply(), b"{}"), ({}, reply(), b'{"pdserve.first":{"token":"x"}}'), ({}, b"<html>", handover()),
        ({}, reply(text=None), handover()), ({}, reply(), handover(room=1)),
        ({"max_tokens": 9}, reply(), handover(room=8)), ({}, reply(finish="abort"), handover()),
    ],
)  # fmt: skip
def test_what_is_not_known_for_certain_waits_for_the_consumer(asked: dict[str, Any], said: bytes, told: bytes) -> None:
    assert dialect.first(COMPLETIONS, body(**asked), said, told) is None


def test_a_chat_that_a_parser_reads_waits_for_the_consumer() -> None:
    assert dialect.first(CHAT, body(), reply(True), handover()) is not None
    assert dialect.first(CHAT, body(), reply(True), handover(chat=False)) is None
    assert dialect.first(COMPLETIONS, body(), reply(), handover(chat=False)) is not None
    for more in ({"reasoning": "hm"}, {"reasoning_content": "hm"}, {"tool_calls": [{"id": 1}]}):
        assert dialect.first(CHAT, body(), reply(True, **more), handover()) is None


def test_the_connector_tells_which_it_was() -> None:
    request = types.SimpleNamespace(output_token_ids=[42, 43], num_prompt_tokens=90)
    told = first.told(request, 100, chat=True)
    assert told == {"pdserve.first": {"token": 42, "room": 10, "chat": True}}
    request.output_token_ids = []
    assert first.told(request, 100, chat=True) == {}


def test_the_prompts_ids_are_asked_for_where_the_client_did() -> None:
    asked = body(prompt="a", return_token_ids=True, logprobs=None)
    assert "return_token_ids" not in json.loads(dialect.prefill_body(COMPLETIONS, asked))
    assert json.loads(dialect.prefill_body(COMPLETIONS, asked, ids=True))["return_token_ids"] is True

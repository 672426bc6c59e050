from __future__ import annotations

import json
from typing import Any

import pytest

from pdserve import engines
from pdserve.engines.body import Body
from pdserve.engines.vllm import dialect
from pdserve.errors import ConfigError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def body(**fields: Any) -> Body:
    return Body(json.dumps(fields).encode())


def prefill(endpoint: str, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(dialect.prefill_body(endpoint, body(**fields)))
    return found


@pytest.mark.parametrize("name", engines.names())
def test_every_engine_has_the_whole_dialect(name: str) -> None:
    found = engines.dialect(name)
    assert found.early_handover(600) is None or b"do_remote_prefill" in found.early_handover(600)
    asked = body(model="m", prompt="a b", max_tokens=9, stream=True)
    assert found.why_local(COMPLETIONS, asked) is None
    assert json.loads(found.prefill_body(COMPLETIONS, asked))["prompt"] == "a b"
    assert found.decode_body(COMPLETIONS, asked, None) == asked.raw
    assert found.read_handover(b'{"choices": []}') is None
    with pytest.raises(ValueError, match="prefill reply"):
        found.read_handover(b"<html>")


def test_an_unknown_engine_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="vllm, fake"):
        engines.dialect("sglong")


@pytest.mark.parametrize(
    ("endpoint", "limits", "expected"),
    [
        (COMPLETIONS, {}, {"max_tokens": 1}),
        (COMPLETIONS, {"max_tokens": 50}, {"max_tokens": 1}),
        (COMPLETIONS, {"max_tokens": None}, {"max_tokens": 1}),
        (CHAT, {}, {"max_tokens": 1}),
        (CHAT, {"max_tokens": 50}, {"max_tokens": 1}),
        (CHAT, {"max_completion_tokens": 50}, {"max_completion_tokens": 1}),
        (CHAT, {"max_tokens": 60, "max_completion_tokens": 50}, {"max_tokens": 1, "max_completion_tokens": 1}),
    ],
)
def test_every_token_limit_is_one(endpoint: str, limits: dict[str, Any], expected: dict[str, Any]) -> None:
    made = prefill(endpoint, model="m", prompt="a", **limits)
    assert {k: v for k, v in made.items() if k.startswith("max_")} == expected
    assert made["stream"] is False
    assert made["kv_transfer_params"] == {
        "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
        "remote_host": None, "remote_port": None,
    }  # fmt: skip


def test_what_concerns_the_answer_alone_is_left_out_of_the_prefill() -> None:
    made = prefill(
        CHAT, messages=MESSAGES, min_tokens=5, stream=True, stream_options={"include_usage": True}, n=4, best_of=4,
        logprobs=True, top_logprobs=3, response_format={"type": "json_object"}, structured_outputs={"json": {}},
        temperature=0.5, seed=1, cache_salt="s", priority=3, chat_template_kwargs={"a": 1}, reasoning_effort="low",
    )  # fmt: skip
    assert made["n"] == 1
    assert not made.keys() & {
        "min_tokens", "stream_options", "best_of", "logprobs", "top_logprobs", "response_format", "structured_outputs"
    }  # fmt: skip
    assert made["chat_template_kwargs"] == {"a": 1}
    assert (made["cache_salt"], made["priority"], made["reasoning_effort"]) == ("s", 3, "low")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_a_forced_tool_call_is_not_forced_on_one_token(choice: Any) -> None:
    made = prefill(CHAT, messages=MESSAGES, tools=[{"type": "function"}], tool_choice=choice)
    assert made["tool_choice"] == "none"
    assert made["tools"] == [{"type": "function"}]


@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_other_tool_choices_stay(choice: Any) -> None:
    assert prefill(CHAT, messages=MESSAGES, tool_choice=choice)["tool_choice"] == choice


def test_the_prompt_keeps_its_bytes() -> None:
    prompt = rb'"caf\u00e9 \/ \ud83d\ude00  \t"'
    raw = b'{ "temperature" : 1.0e-1,"prompt": ' + prompt + b' , "max_tokens":7,"model":"m"}'
    made = dialect.prefill_body(COMPLETIONS, Body(raw))
    assert made.startswith(b'{ "temperature" : 1.0e-1,"prompt": ' + prompt + b' , "max_tokens":1,"model":"m"')
    handover = b'{"do_remote_prefill":true, "x":[ 1,2 ]}'
    assert (
        dialect.decode_body(COMPLETIONS, Body(raw), handover)
        == raw[:-1] + b', "kv_transfer_params": ' + handover + b"}"
    )


def test_a_clients_own_transfer_params_never_reach_an_engine() -> None:
    asked = body(prompt="a", kv_transfer_params={"remote_host": "evil"}, max_tokens=3)
    assert b"evil" not in dialect.prefill_body(COMPLETIONS, asked)
    assert b"evil" not in dialect.decode_body(COMPLETIONS, asked, None)
    assert b"evil" not in dialect.decode_body(COMPLETIONS, asked, b"{}")


@pytest.mark.parametrize(
    ("endpoint", "fields", "why"),
    [
        (COMPLETIONS, {"prompt": "a"}, None),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, None),
        (COMPLETIONS, {"prompt": []}, None),
        (COMPLETIONS, {"prompt": ["a"]}, None),
        (COMPLETIONS, {"prompt": [[1, 2]]}, None),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "several-prompts"),
        (COMPLETIONS, {"prompt": [[1], [2]]}, "several-prompts"),
        (COMPLETIONS, {"prompt": "a", "echo": True}, None),
        (COMPLETIONS, {"prompt": "a", "echo": True, "logprobs": 1}, "prompt-logprobs"),
        (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 0}, "prompt-logprobs"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "no-tokens"),
        (COMPLETIONS, {"prompt_embeds": "x"}, "prompt-embeds"),
        (COMPLETIONS, {"prompt": "a", "use_beam_search": True}, "beam-search"),
        (COMPLETIONS, {"prompt": {"a": 1}}, None),
        (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}, None),
        (CHAT, {"messages": MESSAGES, "echo": True, "top_logprobs": 2}, "prompt-logprobs"),
        (CHAT, {"messages": MESSAGES, "prompt_logprobs": 2}, "prompt-logprobs"),
        (CHAT, {"messages": 3, "echo": "yes"}, None),
    ],
)
def test_what_cannot_be_split(endpoint: str, fields: dict[str, Any], why: str | None) -> None:
    assert dialect.why_local(endpoint, body(**fields)) == why


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (b'{"id":"x","kv_transfer_params":{"a" : [1, 2], "b":null}}', b'{"a" : [1, 2], "b":null}'),
        (b'{"id":"x","kv_transfer_params":null}', None),
        (b'{"id":"x"}', None),
    ],
)
def test_the_handover_is_verbatim(reply: bytes, expected: bytes | None) -> None:
    assert dialect.read_handover(reply) == expected


@pytest.mark.parametrize("reply", [b"", b"[]", b'{"kv_transfer_params": 3}', b'{"kv_transfer_params":', b"\xff"])
def test_a_reply_that_is_none_is_an_error(reply: bytes) -> None:
    with pytest.raises(ValueError, match="prefill reply"):
        dialect.read_handover(reply)


@pytest.mark.parametrize(
    ("handover", "expected"),
    [
        (b'{"pdserve.cached_tokens": 12, "x": [1]}', 12),
        (b'{"pdserve.cached_tokens": 0}', 0),
        (b"{}", None),
        (b'{"pdserve.cached_tokens": null}', None),
        (b'{"pdserve.cached_tokens": -1}', None),
        (b'{"pdserve.cached_tokens": true}', None),
        (b'{"pdserve.cached_tokens": {"gpu": 1}}', None),
        (b"[]", None),
    ],
)
def test_what_the_producer_says_it_had_cached(handover: bytes, expected: int | None) -> None:
    assert dialect.cached_tokens(handover) == expected


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            b'{"usage":{"prompt_tokens_details":{"cached_tokens":99}}}',
            b'{"usage":{"prompt_tokens_details":{"cached_tokens":7}}}',
        ),
        (
            b'{"prompt_tokens_details": {"cached_tokens": null, "multimodal_tokens": {"image": 3}}}',
            b'{"prompt_tokens_details": {"cached_tokens": 7, "multimodal_tokens": {"image": 3}}}',
        ),
        (b'{"prompt_tokens_details":null}', b'{"prompt_tokens_details":{"cached_tokens":7}}'),
        (b'{"usage":{"prompt_tokens":5}}', b'{"usage":{"prompt_tokens":5}}'),
        (
            b'{"text":"\\"prompt_tokens_details\\":{\\"cached_tokens\\":99}"}',
            b'{"text":"\\"prompt_tokens_details\\":{\\"cached_tokens\\":99}"}',
        ),
    ],
)
def test_cached_tokens_are_told_and_nothing_else_is_changed(said: bytes, told: bytes) -> None:
    assert dialect.tell_cached(said, 7) == told

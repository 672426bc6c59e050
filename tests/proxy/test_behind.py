"""The seam behind a producer's first token, however the consumer's engine cuts its answer into events and the network those."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.proxy.behind import Behind, Differs, tokens_to_text, with_text
from pdserve.proxy.given import Given, events
from pdserve.proxy.seam import Diverged

TOKENS = st.lists(st.sampled_from(["", "a", " b", "\u9db4", '"id":"x",', "\n\n", "data: ", "\\", "\ufffd"]), min_size=1, max_size=8)
PROMPT = [7, 8, 9]


def event(chat: bool, created: int, choice: dict[str, Any], **more: Any) -> bytes:
    kind = "chat.completion.chunk" if chat else "text_completion"
    made = {"id": f"cmpl-{created}", "object": kind, "created": created, "model": "m", "choices": [choice], **more}
    return b"data: " + json.dumps(made, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def role(chat: bool, created: int, prompt: list[int] | None) -> list[bytes]:
    delta = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    return [event(chat, created, delta, prompt_token_ids=prompt)] if chat else []


def piece(chat: bool, created: int, text: str, ids: list[int], finish: str | None, prompt: list[int] | None) -> bytes:
    end = {"logprobs": None, "finish_reason": finish, "token_ids": ids}
    if chat:
        return event(chat, created, {"index": 0, "delta": {"content": text}, **end})
    return event(chat, created, {"index": 0, "text": text, **end, "stop_reason": None, "prompt_token_ids": prompt})


def answer(chat: bool, texts: list[str], cuts: list[int], held: int) -> list[bytes]:
    """As an engine streams it, `held` characters behind, some tokens in one event."""
    out, full, sent, ids = role(chat, 2, PROMPT), "", 0, []
    for n, text in enumerate(texts):
        full += text
        ids.append(n)
        last = n == len(texts) - 1
        if last or n not in cuts:
            upto = len(full) if last else max(sent, len(full) - held)
            out.append(piece(chat, 2, full[sent:upto], ids, "length" if last else None, None if len(out) else PROMPT))
            sent, ids = upto, []
    return [*out, b"data: [DONE]\n\n"]


def begun(chat: bool, text: str, token: int = 0, prompt: list[int] | None = None) -> tuple[Given, Behind]:
    has = Given()
    for data in (*role(chat, 1, prompt), piece(chat, 1, text, [token], None, None if chat else prompt)):
        has.add(data)
    has.fold()
    return has, Behind(has, token)


def summed(data: bytes) -> tuple[str, list[int], list[str]]:
    choices = [choice for found in events(data) for choice in found["choices"]]
    text = "".join(choice.get("text") or (choice.get("delta") or {}).get("content") or "" for choice in choices)
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    return text, [token for choice in choices for token in choice.get("token_ids") or ()], ends


@settings(max_examples=200, deadline=None)
@given(st.booleans(), TOKENS, st.lists(st.integers(0, 7)), st.integers(0, 3), st.lists(st.booleans(), min_size=12, max_size=12))
def test_what_is_left_is_all_behind_the_first_token(
    chat: bool, texts: list[str], cuts: list[int], held: int, joins: list[bool]
) -> None:
    shown = texts[0][: max(0, len(texts[0]) - held)] if len(texts) > 1 else texts[0]
    has, seam = begun(chat, shown)
    came, waiting = b"", b""
    for n, data in enumerate(answer(chat, texts, cuts, held)):
        waiting += data
        if not joins[n % len(joins)]:
            came, waiting = came + seam.feed(waiting), b""
    came += seam.feed(waiting) if waiting else b""
    text, ids, ends = summed(came)
    assert (shown + text, [0, *ids], ends) == ("".join(texts), list(range(len(texts))), ["length"])
    assert seam.joined
    assert {(found["id"], found["created"]) for found in events(came)} <= {("cmpl-1", 1)}
    assert came.endswith(b"data: [DONE]\n\n")
    assert has.prompt_ids == b"[7,8,9]"


@pytest.mark.parametrize("chat", [False, True])
def test_another_first_token_is_told_with_the_prompts_ids(chat: bool) -> None:
    has, seam = begun(chat, "a", token=5)
    with pytest.raises(Differs):
        seam.feed(b"".join(answer(chat, ["a", "b"], [], 0)))
    assert has.prompt_ids == b"[7,8,9]"
    assert not seam.joined


@pytest.mark.parametrize("chat", [False, True])
def test_what_cannot_be_joined(chat: bool) -> None:
    with pytest.raises(Diverged, match="reads differently"):
        begun(chat, "a")[1].feed(b"".join(answer(chat, ["b"], [], 0)))
    with pytest.raises(Diverged, match="before its first token"):
        begun(chat, "a")[1].feed(b"data: [DONE]\n\n")
    thought = {"index": 0, "delta": {"reasoning": "hm"}, "logprobs": None, "finish_reason": None, "token_ids": [0]}
    with pytest.raises(Diverged, match="another form"):
        begun(True, "a")[1].feed(event(True, 2, thought))


def test_a_client_that_has_the_prompts_ids_gets_them_once() -> None:
    has, seam = begun(False, "a", prompt=PROMPT)
    came = seam.feed(b"".join(answer(False, ["a", "b"], [0], 0)))
    assert [found["choices"][0]["prompt_token_ids"] for found in events(came)] == [None]
    assert has.prompt_ids == b"[7,8,9]"


def test_the_first_text_behind_a_part_of_a_character() -> None:
    silent, wrong = piece(False, 2, "", [1], None, None), piece(False, 2, "all of the prompt\u9db4", [2, 3], None, None)
    assert tokens_to_text(silent) is None
    assert tokens_to_text(silent + wrong + piece(False, 2, "x", [4], None, None)) == [1, 2, 3]
    assert tokens_to_text(silent + piece(False, 2, "", [2], "length", None)) == [1, 2]
    put = with_text(silent + wrong + piece(False, 2, "x", [4], "length", None) + b"data: [DONE]\n\n", "\u9db4 \ufffd")
    assert summed(put) == ("\u9db4x", [1, 2, 3, 4], ["length"])
    assert put.endswith(b"[DONE]\n\n")

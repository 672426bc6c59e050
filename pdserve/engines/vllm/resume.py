"""Carrying a stream on with another vLLM after the first one died: what can be, and what the second one is asked.

A stream of plain text is resumed: the next engine gets the prompt's token ids and those generated so far as its prompt,
through /v1/completions, and goes on where the other stopped. That is exact for greedy decoding, and for sampling
without a seed it is as good a continuation as any. vLLM's generation state beyond the tokens cannot be handed over:

    the state of a tool or reasoning parser, of a grammar, of a seeded generator; the counts of presence and frequency
    penalties; which bad words have begun; logprobs already given; several choices; embeddings and images in the prompt

With any of these a request can only be repeated from the start, which makes sense where it gives the same again: with
temperature 0 or with a seed. One exception is made: penalties with unseeded sampling are resumed (they count anew from
the seam), because that answer was left to chance anyway.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import msgspec

from pdserve.engines.body import Body

CHAT: Final = "/v1/chat/completions"
MESSAGES: Final = "/v1/messages"
RESUME_PATH: Final = "/v1/completions"

# Fields that mean the same in both endpoints and go into the resuming request as they are.
_KEPT: Final = (
    "model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "logit_bias", "allowed_token_ids",
    "skip_special_tokens", "spaces_between_special_tokens", "cache_salt", "priority", "user", "session_id",
    "stream_options",
)  # fmt: skip
# Fields that shape the prompt, whose token ids are known by then, and those that are written anew.
_SPENT: Final = (
    "prompt", "messages", "add_special_tokens", "add_generation_prompt", "continue_final_message", "chat_template",
    "chat_template_kwargs", "documents", "reasoning_effort", "truncate_prompt_tokens", "stream", "kv_transfer_params",
    "return_token_ids", "max_tokens", "max_completion_tokens", "min_tokens", "request_id", "metadata", "store",
)  # fmt: skip
# Fields that are as good as absent with these values.
_HARMLESS: Final[dict[str, tuple[object, ...]]] = {
    "n": (1, None), "best_of": (1, None), "echo": (False, None), "logprobs": (False, None), "top_logprobs": (0, None),
    "prompt_logprobs": (None,), "seed": (None,), "suffix": (None,), "use_beam_search": (False, None),
    "tools": ([], None), "tool_choice": ("none", "auto", None), "response_format": ({"type": "text"}, None),
    "structured_outputs": (None,), "parallel_tool_calls": (True, False, None), "bad_words": ([], None),
    "logprob_token_ids": (None,), "prompt_embeds": (None,),
}  # fmt: skip
_KNOWN: Final = frozenset((*_KEPT, *_SPENT, *_HARMLESS))
_MEDIA: Final = (b'"image', b'"video', b'"audio', b'"input_audio', b'"file')
# In JSON text a quote inside a value is escaped, so these can only be the keys themselves.
_IDS: Final = re.compile(rb'"((?:prompt_)?token_ids)":\[[0-9,]*\]')
_IDLE: Final = re.compile(rb'data: \{[^\n]*"delta":\{\},"logprobs":null,"finish_reason":null[^\n]*\n\n')


class _Said(msgspec.Struct):
    prompt: str


def resumable(endpoint: str, body: Body) -> bool:
    """The tokens say everything about where this stream is."""
    for name, value in _HARMLESS.items():
        if name in body and body.get(name) not in value:
            return False
    if not body.names() <= _KNOWN:
        return False
    if endpoint == CHAT:
        messages = body.raw_value("messages") or b""
        return not any(word in messages for word in _MEDIA)
    prompt = body.raw_value("prompt") or b""
    return not prompt.startswith(b"[") or prompt[1:].lstrip()[:1] not in (b'"', b"[")


def is_harmless(name: str, value: object) -> bool:
    """The field may have any value, or has one that is as good as none, and no other that merely compares equal to it."""
    return name not in _HARMLESS or any(type(value) is type(known) and value == known for known in _HARMLESS[name])


def greedy(body: Body) -> bool:
    temperature = body.get("temperature")
    return isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature == 0


def repeatable(endpoint: str, body: Body) -> bool:
    """Asked once more it gives the same. /v1/messages has no seed."""
    return greedy(body) or (endpoint != MESSAGES and isinstance(body.get("seed"), int))


def counts_apart(body: Body) -> bool:
    """Penalties that count generated tokens only: what is generated so far would be uncounted as part of a prompt."""
    return any(body.get(name) not in (None, 0) for name in ("presence_penalty", "frequency_penalty"))


def stop_strings(body: Body) -> tuple[list[str], bool, int]:
    """The strings that end the answer, whether they stay in its text, and the number of tokens before which none counts."""
    stop = body.get("stop")
    words = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    least = body.get("min_tokens")
    found = [word for word in words if isinstance(word, str) and word]
    return found, body.get("include_stop_str_in_output") is True, least if isinstance(least, int) else 0


def held_back(body: Body) -> int:
    """How many characters vLLM keeps back of a running stream, because a stop string may have begun in them."""
    words, kept, _ = stop_strings(body)
    return max(map(len, words), default=1) - 1 if not kept else 0


def detokenize(body: Body, ids: Sequence[int]) -> tuple[bytes, bytes]:
    """The question what these tokens say: a path and a body."""
    model = body.raw_value("model")
    named = b'"model":%b,' % model if model is not None else b""
    return b"/detokenize", b'{%b"tokens":%b}' % (named, msgspec.json.encode(list(ids)))


def detokenized(reply: bytes) -> str | None:
    """The answer to it."""
    try:
        return msgspec.json.decode(reply, type=_Said).prompt
    except msgspec.DecodeError:
        return None


def hide_ids(data: bytes) -> bytes:
    """Whole events without the token ids, as vLLM sends them when it is not asked for any."""
    if b'token_ids":[' not in data:
        return data
    if b'"delta":{}' in data:  # a token that a parser swallowed: an event only because its id was asked for
        data = _IDLE.sub(b"", data)
    return _IDS.sub(rb'"\1":null', data)


def resume_body(
    endpoint: str, body: Body, prompt_ids: bytes, ids: Sequence[int], without: Sequence[str] = ()
) -> bytes:
    """A request to RESUME_PATH that goes on behind `ids`. `prompt_ids` is the JSON list that the first engine gave."""
    fields = {name: raw for name in _KEPT if name not in without and (raw := body.raw_value(name)) is not None}
    limit = body.get("max_tokens")
    if endpoint == CHAT:
        limit = body.get("max_completion_tokens") or limit
    elif "max_tokens" not in body:
        limit = 16  # the default of /v1/completions
    fields["max_tokens"] = b"null" if limit is None else b"%d" % max(1, int(limit) - len(ids))
    if isinstance(least := body.get("min_tokens"), int) and least > len(ids):
        fields["min_tokens"] = b"%d" % (least - len(ids))
    tail = b",".join(b"%d" % token for token in ids)
    start = prompt_ids.rstrip(b"] ")
    fields["prompt"] = b"%b%b%b]" % (start, b"," if tail and start != b"[" else b"", tail)
    fields |= {"stream": b"true", "return_token_ids": b"true"}
    return b"{%b}" % b",".join(b"%b:%b" % (msgspec.json.encode(k), v) for k, v in fields.items())

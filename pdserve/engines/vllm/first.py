"""The producer's own first token, made into the beginning of the client's stream. Pure.

A producer computes it with the prompt. Its connector tells which token it is in the handover, and the prefill leg's reply
says its text; from both come the events with which vLLM's own stream of the same request would begin, or, where the
answer ends with that token, all of them. What a consumer says behind it is the proxy's to join (proxy/behind.py).

Only what both engines cut into tokens, choose and show in the same way can be begun so; all else waits for the consumer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from pdserve.engines.body import Body
from pdserve.engines.vllm.resume import CHAT, counts_apart, greedy, held_back, is_harmless, resumable

_KEY: Final = "pdserve.first"
_DONE: Final = b"data: [DONE]\n\n"
_LIMITS: Final = ("max_tokens", "max_completion_tokens")


class First(NamedTuple):
    """`shown` is what a stream gives of the token's text at once, `hidden` what it keeps back since a stop string may have
    begun in it. `events` have token ids, asked for or not. `over`: they are the whole answer."""

    token: int
    shown: str
    hidden: str
    events: bytes
    over: bool


class _Told(msgspec.Struct):
    token: int
    room: int
    chat: bool


class _Handover(msgspec.Struct):
    first: _Told | None = msgspec.field(name=_KEY, default=None)


class _Message(msgspec.Struct):
    role: str
    content: str | None = None
    reasoning: object = None
    reasoning_content: object = None
    tool_calls: list[object] | None = None


class _Choice(msgspec.Struct):
    finish_reason: str
    text: str | None = None
    message: _Message | None = None
    stop_reason: int | str | None = None
    prompt_token_ids: list[int] | None = None


class _Reply(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[_Choice]
    usage: dict[str, Any]
    prompt_token_ids: list[int] | None = None
    prompt_text: object = msgspec.UNSET


_replies, _handovers = msgspec.json.Decoder(_Reply), msgspec.json.Decoder(_Handover)


def told(request: Any, max_model_len: int, chat: bool) -> dict[str, Any]:
    """The part of the handover, made by the connector. `chat`: this engine's chats are plain text, which no parser changes."""
    ids: Any = getattr(request, "output_token_ids", None)
    if not ids or not max_model_len:
        return {}
    return {_KEY: {"token": int(ids[0]), "room": max_model_len - request.num_prompt_tokens, "chat": chat}}


def may_begin(endpoint: str, body: Body) -> bool:
    """The request is one whose stream can be begun by a producer: the consumer will refuse nothing that the producer has
    not seen, and can go on behind any first token."""
    if not resumable(endpoint, body) or counts_apart(body) or body.get("min_tokens") not in (None, 0):
        return False
    if not all(is_harmless(name, body.get(name)) for name in body.names()):
        return False
    if endpoint != CHAT and body.get("logprobs") is not None:  # false is read as 0, which asks for some
        return False
    limits = [body.get(name) for name in _LIMITS if name in body]
    if not all(limit is None or (type(limit) is int and limit > 1) for limit in limits):
        return False
    options = body.get("stream_options")
    if options is not None and not (isinstance(options, dict) and options.keys() <= {"include_usage"}):
        return False
    flags = (body.get("return_token_ids"), (options or {}).get("include_usage"))
    return all(flag is None or isinstance(flag, bool) for flag in flags)


def first(endpoint: str, body: Body, reply: bytes, handover: bytes) -> First | None:
    """What the reply to a prefill leg of such a request begins the stream with; None: the consumer is to begin it."""
    try:
        known = _handovers.decode(handover).first
        said = _replies.decode(reply) if known is not None else None
    except (msgspec.DecodeError, RecursionError):
        return None
    if known is None or said is None or len(said.choices) != 1 or not _room(body, known.room):
        return None
    choice, text = said.choices[0], _text(endpoint, said.choices[0])
    if text is None or (endpoint == CHAT and not known.chat) or choice.finish_reason not in ("length", "stop"):
        return None
    over = choice.finish_reason == "stop"
    # Without chance the consumer comes to the same by itself, and says in its own words what is no plain piece of text (a
    # part of a character, the end). With chance it would not: to leave the choice to it then would make such tokens rarer.
    if greedy(body) and (over or not text):
        return None
    at = len(text) if over else max(0, len(text) - held_back(body))
    events = _Events(endpoint, body, said, known.token).of(text[:at], choice if over else None)
    return First(known.token, text[:at], text[at:], events, over)


def _room(body: Body, room: int) -> bool:
    """The consumer will not refuse it for its length, and has a place behind the first token."""
    limits = [limit for name in _LIMITS if (limit := body.get(name)) is not None]
    return max(limits, default=2) <= room


def _text(endpoint: str, choice: _Choice) -> str | None:
    if endpoint != CHAT:
        return choice.text
    message = choice.message
    if message is None or message.reasoning or message.reasoning_content or message.tool_calls:
        return None
    return message.content


class _Events:
    """In the form of vLLM's streams."""

    def __init__(self, endpoint: str, body: Body, reply: _Reply, token: int) -> None:
        self._chat, self._body, self._reply, self._token = endpoint == CHAT, body, reply, token
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        self._frame = {"id": reply.id, "object": kind, "created": reply.created, "model": reply.model}

    def of(self, text: str, last: _Choice | None) -> bytes:
        """`last`: with the end of the answer."""
        events = [*self._role(), self._piece(text, last)]
        if last is not None and (self._body.get("stream_options") or {}).get("include_usage") is True:
            events.append({**self._frame, "choices": [], "usage": self._reply.usage})
        data = b"".join(b"data: %b\n\n" % msgspec.json.encode(event) for event in events)
        return data + (_DONE if last is not None else b"")

    def _role(self) -> list[Mapping[str, Any]]:
        message = self._reply.choices[0].message
        if not self._chat or message is None:
            return []
        delta = {"role": message.role, "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        prompt: dict[str, Any] = {"prompt_token_ids": self._reply.prompt_token_ids}
        if self._reply.prompt_text is not msgspec.UNSET:  # newer versions have the field, in streams too
            prompt["prompt_text"] = None
        return [{**self._frame, "choices": [choice], **prompt}]

    def _piece(self, text: str, last: _Choice | None) -> Mapping[str, Any]:
        shown: dict[str, Any]
        finish = last.finish_reason if last is not None else None
        stop = {"stop_reason": last.stop_reason if last is not None else None}
        ids: dict[str, Any] = {"token_ids": [self._token]}
        end: dict[str, Any] = {"logprobs": None, "finish_reason": finish}
        if self._chat:
            shown = {"delta": {"content": text}, **end, **(stop if finish else {}), **ids}
        else:
            prompt = {"prompt_token_ids": self._reply.choices[0].prompt_token_ids}
            shown = {"text": text, **end, **stop, **prompt, **ids}
        return {**self._frame, "choices": [{"index": 0, **shown}]}

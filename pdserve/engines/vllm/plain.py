"""/v1/responses and /v1/messages where they are plain chats: what is asked to go on with one on another vLLM. Pure.

Neither endpoint tells token ids, so they are asked for: /tokenize renders the same chat and counts the text so far. The
text may be cut into other tokens than those that were generated, which changes nothing that a client could see; that is
why it is done only where chance is involved anyway. What shapes a prompt in ways that /tokenize has no words for (tools,
pictures, thinking, a stored response) is not plain.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from pdserve.engines.body import Body

MESSAGES: Final = "/v1/messages"
_SAME: Final = ("model", "temperature", "top_p", "top_k", "cache_salt")
# What each field is called in /v1/completions.
_FIELDS: Final[dict[str, dict[str, str]]] = {
    MESSAGES: {**{name: name for name in _SAME}, "stop_sequences": "stop", "max_tokens": "max_tokens"},
    "/v1/responses": {
        **{name: name for name in (
            *_SAME, "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "stop", "stop_token_ids",
            "ignore_eos", "logit_bias", "skip_special_tokens", "include_stop_str_in_output", "priority", "user", "session_id",
        )},
        "max_output_tokens": "max_tokens",
    },
}  # fmt: skip
_PROMPT: Final = {
    MESSAGES: ("messages", "system", "stream", "metadata", "kv_transfer_params"),
    "/v1/responses": ("input", "instructions", "stream", "metadata", "kv_transfer_params", "store", "request_id",
                      "prompt_cache_key", "parallel_tool_calls", "include_reasoning", "service_tier", "max_tool_calls"),
}  # fmt: skip
# Fields that are as good as absent with these values.
_HARMLESS: Final[dict[str, tuple[object, ...]]] = {
    "tools": ([], None), "tool_choice": ("none", "auto", {"type": "none"}, {"type": "auto"}, None), "thinking": (None,),
    "output_config": (None,), "text": (None, {"format": {"type": "text"}}), "reasoning": (None,), "include": ([], None),
    "top_logprobs": (0, None), "background": (False, None), "previous_response_id": (None,), "prompt": (None,),
    "truncation": ("disabled", None), "structured_outputs": (None,), "seed": (None,), "enable_response_messages": (False,),
    "chat_template_kwargs": ({}, None),
}  # fmt: skip


class _Tokens(msgspec.Struct):
    tokens: list[int]


def completion(endpoint: str, body: Body) -> Body | None:
    """What the request says of its answer, in the words of /v1/completions; None if it is not plain."""
    fields, prompt = _FIELDS[endpoint], _PROMPT[endpoint]
    for name in body.names():
        if name in fields or name in prompt or (name in _HARMLESS and body.get(name) in _HARMLESS[name]):
            continue
        return None
    said = {"max_tokens": b"null"} | {
        fields[name]: body.raw_value(name) or b"null" for name in body.names() if name in fields
    }
    return Body(b"{%b}" % b",".join(b"%b:%b" % (msgspec.json.encode(name), raw) for name, raw in said.items()))


def questions(endpoint: str, body: Body, text: str) -> list[tuple[bytes, bytes]] | None:
    """Paths and bodies: which tokens is the prompt, and which are the text so far? None if it is not plain."""
    chat = _messages(body) if endpoint == MESSAGES else _input(body)
    if chat is None or completion(endpoint, body) is None:
        return None
    model = {"model": body.get("model")} if "model" in body else {}
    prompt = {**model, "messages": chat, "add_generation_prompt": True}
    so_far = {**model, "prompt": text, "add_special_tokens": False}
    return [(b"/tokenize", msgspec.json.encode(asked)) for asked in (prompt, so_far)]


def tokens(reply: bytes) -> list[int] | None:
    """The answer to one of them."""
    try:
        return msgspec.json.decode(reply, type=_Tokens).tokens
    except msgspec.DecodeError:
        return None


def _messages(body: Body) -> list[dict[str, Any]] | None:
    chat: list[dict[str, Any]] = []
    if system := body.get("system"):
        texts = [system] if isinstance(system, str) else _texts(system)
        if texts is None or any(text.startswith("x-anthropic-billing-header") for text in texts):
            return None
        chat.append({"role": "system", "content": "".join(texts)})
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else [None]:
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
            return None
        content = message.get("content")
        texts = [content] if isinstance(content, str) else _texts(content)
        if not texts:
            return None
        parts = [{"type": "text", "text": text} for text in texts]
        chat.append({"role": message["role"], "content": texts[0] if len(texts) == 1 else parts})
    return chat if messages and messages[-1]["role"] == "user" else None


def _texts(blocks: object) -> list[str] | None:
    """Those of a list of text blocks."""
    if not isinstance(blocks, list):
        return None
    texts = []
    for block in blocks:
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            return None
        texts += [block["text"]] if block["text"] else []
    return texts


def _input(body: Body) -> list[dict[str, Any]] | None:
    chat: list[dict[str, Any]] = []
    given, first = body.get("input"), body.get("instructions")
    if isinstance(first, str) and first:
        chat.append({"role": "system", "content": first})
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    for item in items if isinstance(items, list) else [None]:
        if (
            not isinstance(item, dict)
            or item.get("type", "message") != "message"
            or set(item) - {"type", "role", "content"}
        ):
            return None
        content = item.get("content")
        if isinstance(content, list) and all(
            isinstance(part, dict) and part.get("type") == "input_text" for part in content
        ):
            content = [{"type": "text", "text": part.get("text")} for part in content]
        elif not isinstance(content, str):
            return None
        if item.get("role") not in ("user", "assistant", "system"):
            return None
        chat.append({"role": item["role"], "content": content})
    return chat if items and chat[-1]["role"] == "user" else None

"""/v1/responses and /v1/messages of the fake engine: a chat completion in their forms."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"


@dataclass
class AsChat:
    """A request to one of them, as the chat that it is."""

    path: str
    body: dict[str, Any]
    request_id: str


def as_chat(path: str, body: dict[str, Any], request_id: str) -> AsChat:
    chat: dict[str, Any] = {key: body[key] for key in ("model", "stream", "kv_transfer_params") if key in body}
    if path == RESPONSES:
        given = body.get("input", "")
        chat["messages"] = given if isinstance(given, list) else [{"role": "user", "content": given}]
        first = body.get("instructions")
        limit = body.get("max_output_tokens")
    else:
        chat["messages"], first, limit = body.get("messages"), body.get("system"), body.get("max_tokens")
    if first:
        chat["messages"] = [{"role": "system", "content": first}, *chat["messages"]]
    if limit is not None:
        chat["max_tokens"] = limit
    choice = body.get("tool_choice")
    if choice == "required" or (isinstance(choice, dict) and choice.get("type") in ("any", "tool", "function")):
        chat |= {"tool_choice": "required", "tools": [{"function": {"name": "f"}}]}
    return AsChat("/v1/chat/completions", chat, request_id)


def counted(body: dict[str, Any]) -> dict[str, Any]:
    """The words of a chat, as both endpoints that count tokens tell them."""
    contents = [body.get("system") or "", *(m.get("content") or "" for m in body["messages"])]
    parts = [part for content in contents for part in ([{"text": content}] if isinstance(content, str) else content)]
    words = sum(len(part.get("text", "").split()) for part in parts)
    return {"count": words, "input_tokens": words}


def usage(path: str, told: dict[str, Any]) -> dict[str, Any]:
    prompt, cached = told["prompt_tokens"], told["prompt_tokens_details"]["cached_tokens"]
    out = {"output_tokens": told["completion_tokens"]}
    if path == RESPONSES:
        return {"input_tokens": prompt, "input_tokens_details": {"cached_tokens": cached}} | out
    return {"input_tokens": prompt - cached, **out, "cache_read_input_tokens": cached}


def whole(path: str, reply: dict[str, Any]) -> dict[str, Any]:
    text = reply["choices"][0]["message"].get("content", "")
    told = {"usage": usage(path, reply["usage"]), "kv_transfer_params": reply["kv_transfer_params"]}
    if path == RESPONSES:
        content = [{"type": "output_text", "text": text}]
        return {"id": reply["id"], "object": "response", "output": [{"type": "message", "content": content}], **told}
    return {"id": reply["id"], "type": "message", "content": [{"type": "text", "text": text}], **told}


async def events(path: str, pieces: AsyncIterator[str], told: Any) -> AsyncIterator[bytes]:
    """`pieces` of text; `told()` gives the usage when they are over."""
    if path == RESPONSES:
        yield event("response.created", response={})
        async for text in pieces:
            yield event("response.output_text.delta", delta=text)
        yield event("response.completed", response={"usage": usage(path, told())})
        return
    yield event("message_start", message={"usage": {"input_tokens": 0, "output_tokens": 0}})
    async for text in pieces:
        yield event("content_block_delta", delta={"type": "text_delta", "text": text})
    yield event("message_delta", delta={}, usage=usage(path, told()))
    yield event("message_stop")


def event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json.dumps({"type": kind, **fields}).encode())

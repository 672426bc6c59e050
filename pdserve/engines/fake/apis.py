"""/v1/responses and /v1/messages of the fake engine: a chat completion in their forms."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pdserve.engines.fake.answers import ids_of

if TYPE_CHECKING:
    from pdserve.engines.fake.answers import Job

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
    chat["stop"] = body.get("stop" if path == RESPONSES else "stop_sequences")
    chat["include_stop_str_in_output"] = body.get("include_stop_str_in_output")
    choice = body.get("tool_choice")
    if choice == "required" or (isinstance(choice, dict) and choice.get("type") in ("any", "tool", "function")):
        chat |= {"tool_choice": "required", "tools": [{"function": {"name": "f"}}]}
    return AsChat("/v1/chat/completions", chat, request_id)


def counted(body: dict[str, Any], too_many: int = 0) -> dict[str, Any]:
    """The words of a chat, as both endpoints that count tokens tell them."""
    contents = [body.get("system") or "", *(m.get("content") or "" for m in body["messages"])]
    parts = [part for content in contents for part in ([{"text": content}] if isinstance(content, str) else content)]
    words = [word for part in parts for word in part.get("text", "").split()] + ["?"] * too_many
    return {"count": len(words), "input_tokens": len(words), "tokens": ids_of(words)}


def usage(path: str, told: dict[str, Any]) -> dict[str, Any]:
    prompt, cached = told["prompt_tokens"], told["prompt_tokens_details"]["cached_tokens"]
    out = {"output_tokens": told["completion_tokens"]}
    if path == RESPONSES:
        turns: dict[str, list[int]] = {"input_tokens_per_turn": [], "cached_tokens_per_turn": []}
        details = {"reasoning_tokens": 0, "tool_output_tokens": 0, "output_tokens_per_turn": [], "tool_output_tokens_per_turn": []}
        read = {"cached_tokens": cached, "cache_write_tokens": 0, **turns}
        total = {"total_tokens": told["total_tokens"], "output_tokens_details": details}
        return {"input_tokens": prompt, "input_tokens_details": read} | out | total
    return {"input_tokens": prompt - cached, **out, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached}


def whole(path: str, reply: dict[str, Any]) -> dict[str, Any]:
    text = reply["choices"][0]["message"].get("content", "")
    told = {"usage": usage(path, reply["usage"]), "kv_transfer_params": reply["kv_transfer_params"]}
    if path == RESPONSES:
        content = [{"type": "output_text", "text": text}]
        return {"id": reply["id"], "object": "response", "output": [{"type": "message", "content": content}], **told}
    return {"id": reply["id"], "type": "message", "content": [{"type": "text", "text": text}], **told}


async def events(path: str, job: Job) -> AsyncIterator[bytes]:
    """A stream in vLLM's form: one message, or one call of a tool."""
    numbers = itertools.count()
    async for made in _responses(job) if path == RESPONSES else _messages(job):
        if path == RESPONSES:
            made["sequence_number"] = next(numbers)
        yield event(**made)


async def _messages(job: Job) -> AsyncIterator[dict[str, Any]]:
    began = {"id": job.id, "type": "message", "role": "assistant", "content": [], "model": job.engine.model}
    start = {"input_tokens": job.prompt_tokens, "output_tokens": 0}
    yield {"type": "message_start", "message": {**began, "stop_reason": None, "stop_sequence": None, "usage": start}}
    call = {"type": "tool_use", "id": f"call-{job.engine.name}", "name": job.tool, "input": {}}
    kind, name = ("input_json_delta", "partial_json") if job.tool else ("text_delta", "text")
    opened = finish = said = None
    async for step in job.pieces():
        finish, said = step.finish, step.stop_reason
        if step.text:
            if not opened:
                opened = call if job.tool else {"type": "text", "text": ""}
                yield {"type": "content_block_start", "content_block": opened, "index": 0}
            yield {"type": "content_block_delta", "delta": {"type": kind, name: step.text}, "index": 0}
    if opened:
        yield {"type": "content_block_stop", "index": 0}
    why = "max_tokens" if finish == "length" else "stop_sequence" if said else "tool_use" if job.tool else "end_turn"
    delta = {"stop_reason": why, "stop_sequence": said}
    yield {"type": "message_delta", "delta": delta, "usage": usage(MESSAGES, job.usage())}
    yield {"type": "message_stop"}


async def _responses(job: Job) -> AsyncIterator[dict[str, Any]]:
    made: dict[str, Any] = {"id": f"resp_{job.id}_{job.engine.name}", "created_at": job.engine.created, "incomplete_details": None,
                            "model": job.engine.model, "object": "response", "output": [], "status": "in_progress",
                            "usage": None}  # fmt: skip
    yield {"type": "response.created", "response": made}
    yield {"type": "response.in_progress", "response": made}
    item: dict[str, Any] = {"id": f"msg_{job.engine.name}", "content": [], "role": "assistant", "status": "in_progress",
                            "type": "message"}  # fmt: skip
    part: dict[str, Any] = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
    kind = "response.output_text"
    if job.tool:
        call_id = f"call_{job.engine.name}"
        item = {"arguments": "", "call_id": call_id, "name": job.tool, "type": "function_call", "id": f"fc_{job.engine.name}",
                "status": "in_progress"}  # fmt: skip
        kind = "response.function_call_arguments"
    at = {"item_id": item["id"], "output_index": 0} | ({} if job.tool else {"content_index": 0})
    text, finish = "", None
    async for step in job.pieces():
        finish = step.finish
        if step.text:
            if not text:
                yield {"type": "response.output_item.added", "output_index": 0, "item": item}
                if not job.tool:
                    yield {"type": "response.content_part.added", **at, "part": part}
            text += step.text
            yield {"type": kind + ".delta", **at, "delta": step.text} | ({} if job.tool else {"logprobs": []})
    if text and job.tool:
        item = {**item, "arguments": text, "status": "completed"}
        yield {"type": kind + ".done", **at, "arguments": text, "name": job.tool}
    elif text:
        yield {"type": kind + ".done", **at, "logprobs": [], "text": text}
        part = {**part, "text": text, "logprobs": None}
        yield {"type": "response.content_part.done", **at, "part": part}
        item = {**item, "content": [part], "status": "completed"}
    if text:
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}
    short = finish == "length"
    made = {**made, "status": "incomplete" if short else "completed", "output": [item] if text else [],
            "incomplete_details": {"reason": "max_output_tokens"} if short else None,
            "usage": usage(RESPONSES, job.usage())}  # fmt: skip
    yield {"type": "response.completed", "response": made}


def event(type: str, **fields: Any) -> bytes:
    data = json.dumps({"type": type, **fields}, separators=(",", ":"))
    return b"event: %b\ndata: %b\n\n" % (type.encode(), data.encode())

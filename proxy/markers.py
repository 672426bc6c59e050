"""`cache_control` markers: where in a request they are, and the request up to each of them. Pure.

Anthropic's clients mark blocks of `tools`, `system` and `messages`; OpenAI's may mark content parts and tools alike. A
marker says that the prompt up to and with its block is worth keeping, for five minutes unless `ttl` says "1h". The
prompt is what templates make of it in this order: tools, system, messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec

from pdserve.proxy import openai

TTL: Final = {"5m": 300.0, "1h": 3600.0}
MOST: Final = 4  # markers of one request, as many as Anthropic allows; of more the last ones count
_SHAPES_PROMPT: Final = (
    "model", "tools", "system", "chat_template", "chat_template_kwargs", "add_special_tokens", "mm_processor_kwargs",
)  # fmt: skip
_SOME_MESSAGE: Final = {"role": "user", "content": ""}


@dataclass(frozen=True, slots=True)
class Marker:
    """`counted` is the body for the endpoint that counts the tokens of the prompt up to this marker; `salt` parts the
    caches of tenants."""

    ttl: float
    counted: bytes
    salt: str = ""


def count_path(endpoint: str) -> bytes:
    """Where the tokens of a prompt are counted."""
    return b"/v1/messages/count_tokens" if endpoint == openai.MESSAGES else b"/tokenize"


def tokens(endpoint: str, reply: bytes) -> int | None:
    """The count that came back."""
    try:
        told = msgspec.json.decode(reply)["input_tokens" if endpoint == openai.MESSAGES else "count"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return None
    return told if isinstance(told, int) else None


def markers(endpoint: str, raw: bytes) -> list[Marker]:
    """Of a body with markers, in their order. Nothing for a body that is not of the form."""
    if endpoint not in (openai.CHAT, openai.MESSAGES) or b'"cache_control"' not in raw:
        return []
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return []
    found: list[tuple[float, dict[str, Any]]] = []
    base = {key: body[key] for key in _SHAPES_PROMPT if key in body}
    if endpoint == openai.CHAT:
        base |= {"add_generation_prompt": False}
    for n, tool in enumerate(_listed(body.get("tools"))):
        if ttl := _ttl(tool):
            found.append(
                (ttl, _only(base, ("system",)) | {"tools": body["tools"][: n + 1], "messages": [_SOME_MESSAGE]})
            )
    for n, block in enumerate(_listed(body.get("system"))):
        if ttl := _ttl(block):
            found.append((ttl, base | {"system": body["system"][: n + 1], "messages": [_SOME_MESSAGE]}))
    messages = _listed(body.get("messages"))
    for n, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        if ttl := _ttl(message):
            found.append((ttl, base | {"messages": messages[: n + 1]}))
        for m, part in enumerate(_listed(message.get("content"))):
            if ttl := _ttl(part):
                cut = {**message, "content": message["content"][: m + 1]}
                found.append((ttl, base | {"messages": [*messages[:n], cut]}))
    salt = str(body.get("cache_salt") or "")
    return [Marker(ttl, openai.without_markers(msgspec.json.encode(upto)), salt) for ttl, upto in found[-MOST:]]


def _ttl(block: Any) -> float:
    """Seconds; 0 for a block without a marker."""
    mark = block.get("cache_control") if isinstance(block, dict) else None
    if not isinstance(mark, dict) or mark.get("type") != "ephemeral":
        return 0.0
    ttl = mark.get("ttl")
    return TTL.get(ttl, TTL["5m"]) if isinstance(ttl, str) else TTL["5m"]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _only(base: dict[str, Any], without: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in base.items() if key not in without}

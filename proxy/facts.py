"""What routing knows of a request: its session, and a hash for each beginning of its prompt. Pure."""

from __future__ import annotations

from hashlib import blake2b

from pdserve.engines.body import Body
from pdserve.proxy.policies.base import Facts

BLOCK = 1024  # bytes of a prompt that count as one step; about 256 tokens of English
_MOST = 1024  # blocks looked at: a megabyte of prompt
_SESSION_LIMIT = 256
_BODY_KEYS = ("session_id", "user")
_PROMPT = ("tools", "system", "instructions", "messages", "prompt", "input")  # in the order in which templates write them


def facts(endpoint: str, headers: list[tuple[bytes, bytes]], body: Body, with_blocks: bool = True) -> Facts:
    if not with_blocks:
        return Facts(endpoint, sum(map(body.size, _PROMPT)), session(headers, body))
    parts = [raw for name in _PROMPT if name in body and (raw := body.raw_value(name))]
    prompt = parts[0] if len(parts) == 1 else b"".join(parts)
    # What else parts two caches: the model (a LoRA adapter is one), and the salt that keeps tenants from each other.
    root = (body.raw_value("model") or b"") + b"|" + (body.raw_value("cache_salt") or b"")
    request = next((value.decode("latin-1") for name, value in headers if name == b"x-request-id"), "")
    return Facts(endpoint, len(prompt), session(headers, body), blocks(root, prompt), request)


def session(headers: list[tuple[bytes, bytes]], body: Body) -> str:
    """X-Session-ID, else the body's session_id, else its user or metadata.user_id: fields of the body itself, never text of a prompt."""
    for name, given in headers:
        if name == b"x-session-id" and given:
            return given.decode("latin-1")[:_SESSION_LIMIT]
    for key in _BODY_KEYS:
        if isinstance(value := body.get(key) if key in body else None, str) and value:
            return value[:_SESSION_LIMIT]
    metadata = body.get("metadata") if "metadata" in body else None
    if isinstance(metadata, dict) and isinstance(user := metadata.get("user_id"), str):  # where Anthropic's clients put it
        return user[:_SESSION_LIMIT]
    return ""


def blocks(root: bytes, prompt: bytes) -> tuple[int, ...]:
    """One number for each whole block, standing for it and all before it."""
    state, found = blake2b(root, digest_size=8), []
    for start in range(0, min(len(prompt), _MOST * BLOCK) - BLOCK + 1, BLOCK):
        state.update(prompt[start : start + BLOCK])
        found.append(int.from_bytes(state.copy().digest(), "big"))
    return tuple(found)

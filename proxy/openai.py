"""The OpenAI surface: which paths there are, what a request must look like, and what an error looks like.

The checks here are few on purpose. The engine knows its own rules and words them better; what is checked is what the
proxy itself must know (that the body is a JSON object, the model's name) or what would be a mystery further on.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from pdserve.engines.body import Body
from pdserve.errors import RequestError

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
RESPONSES: Final = "/v1/responses"
MESSAGES: Final = "/v1/messages"  # Anthropic's
SPLIT: Final = (COMPLETIONS, CHAT, RESPONSES, MESSAGES)  # the endpoints that a prefill and a decode leg can share
CHOICES: Final = (COMPLETIONS, CHAT)  # those whose streams takeover.py can read
PASSED_ON: Final = ("/v1/embeddings", "/v1/messages/count_tokens", "/tokenize", "/detokenize")
FETCHED: Final = ("/v1/models", "/version")

JSON: Final = b"application/json"
EVENTS: Final = b"text/event-stream"
DONE: Final = b"data: [DONE]\n\n"
# How the last event of an orderly stream begins.
LAST: Final[dict[str, tuple[bytes, ...]]] = {
    RESPONSES: (b"event: response.completed", b"event: response.incomplete", b"event: response.failed", b"event: error"),
    MESSAGES: (b"event: message_stop", b"event: error"),
}

# In JSON text a quote inside a value is escaped, so these bytes can only be a key; a schema's own property of that name
# does not say "ephemeral".
_MARK: Final = rb'"cache_control"\s*:\s*\{[^{}]*"type"\s*:\s*"ephemeral"[^{}]*\}'
_MARKER: Final = re.compile(rb"\s*,\s*" + _MARK)
_MARKER_ALONE: Final = re.compile(_MARK + rb"\s*,?\s*")
_NUMBER: Final = re.compile(rb'"sequence_number"\s*:\s*(\d+)')
_REQUEST_ID_LIMIT: Final = 256
# An id of our own: what tells this process from all others, and a number. (A UUID for each request asks the kernel.)
_PROCESS: Final = secrets.token_hex(8)
_number: Final = itertools.count(secrets.randbits(32))
_HOP: Final = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"te",
        b"trailer", b"transfer-encoding", b"upgrade", b"host", b"content-length", b"expect",
    )
)  # fmt: skip
# Set anew on the way in, so that both legs carry the same id and nobody compresses what is relayed event by event.
_REQUEST_DROP: Final = _HOP | {b"x-request-id", b"accept-encoding"}
_ANSWER_DROP: Final = _HOP | {b"x-request-id", b"date", b"server"}


@dataclass(frozen=True, slots=True)
class Ask:
    """What the proxy read out of a completion request."""

    body: Body
    stream: bool


def parse(raw: bytes, models: Collection[str], endpoint: str = COMPLETIONS) -> Ask:
    """Raises RequestError, 400 or 404, worded for the client. An empty `models` means that any name is let through."""
    try:
        body = Body(without_markers(raw))
    except ValueError as exc:
        raise RequestError(400, str(exc)) from exc
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise RequestError(400, f"'stream' must be true or false, not {_shown(body, 'stream')}.", param="stream")
    model = body.get("model")
    if model is not None and endpoint in CHOICES:  # the other endpoints have errors of their own form
        if not isinstance(model, str):
            raise RequestError(400, f"'model' must be a string, not {_shown(body, 'model')}.", param="model")
        if models and model not in models:
            known = ", ".join(sorted(models))
            text = f"The model `{model[:200]}` does not exist. Available: {known}."
            raise RequestError(404, text, "NotFoundError", "model", "model_not_found")
    return Ask(body, stream is True)


def without_markers(raw: bytes) -> bytes:
    """The body without {"cache_control": {"type": "ephemeral"}}: a wish about caching, not a part of the prompt, and
    unknown to engines. A prompt has the same bytes with and without it, and so hits what the other filled."""
    if b'"cache_control"' not in raw:
        return raw
    return _MARKER_ALONE.sub(b"", _MARKER.sub(b"", raw))


def priority(body: Body) -> int | None:
    """vLLM's field: lower is earlier; None where it is not given. Anything but a number is the engine's to refuse."""
    value = body.get("priority") if "priority" in body else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _shown(body: Body, name: str) -> str:
    value = body.raw_value(name) or b""
    return (value if len(value) <= 60 else value[:57] + b"...").decode("utf-8", "replace")


def request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's own id if it is usable (short, printable ASCII), else a new one."""
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    text = given.decode("latin-1").strip()
    if text and len(text) <= _REQUEST_ID_LIMIT and text.isascii() and text.isprintable():
        return text
    return f"{_PROCESS}{next(_number):016x}"


def headers_in(headers: list[tuple[bytes, bytes]], rid: str) -> list[tuple[bytes, bytes]]:
    """What goes on to an engine: all that the client sent, Authorization included, but for this hop's own headers."""
    kept = [pair for pair in headers if pair[0] not in _REQUEST_DROP]
    return [*kept, (b"x-request-id", rid.encode())]


def headers_out(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """What goes back to the client of an engine's headers."""
    return [pair for pair in headers if pair[0] not in _ANSWER_DROP]


def error_json(
    status: int, message: str, type_: str | None = None, param: str | None = None, code: str | None = None
) -> bytes:
    """OpenAI's error object. `code` is the status where there is nothing more telling, as vLLM has it."""
    kind = type_ or ("invalid_request_error" if status < 500 else "upstream_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code or status}}).encode()


def request_error(error: RequestError) -> bytes:
    return error_json(error.status, error.message, error.type, error.param, error.code)


def is_object(body: bytes) -> bool:
    try:
        Body(body)
    except ValueError:
        return False
    return True


def engine_error(endpoint: str, status: int, body: bytes, instance: str) -> bytes:
    """An engine's own error, unchanged if it has an error object (OpenAI's and Anthropic's have); else put into one."""
    said: object = None
    with contextlib.suppress(ValueError):
        said = Body(body).get("error")
    if isinstance(said, dict) and isinstance(said.get("message"), str):
        return body
    text = said if isinstance(said, str) else body[:500].decode("utf-8", "replace").strip() or "no message"
    return error_of(endpoint, status, error_json(status, f"The engine {instance} answered {status}: {text}"))


def error_of(endpoint: str, status: int, body: bytes) -> bytes:
    """An error object of ours in the form of the endpoint."""
    if endpoint != MESSAGES or b'"error"' not in body:
        return body
    said = json.loads(body)
    if said.get("type") == "error":
        return body
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
             429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "api_error")
    return json.dumps({"type": "error", "error": {"type": kind, "message": said["error"]["message"]}}).encode()


def error_event(endpoint: str, body: bytes, before: bytes) -> bytes:
    """An error after the stream has begun, and the stream's end, in the endpoint's own form. `before`: the last events."""
    message = json.loads(body)["error"]["message"]
    event: dict[str, object]
    if endpoint == MESSAGES:
        event = {"type": "error", "error": {"type": "api_error", "message": message}}
    elif endpoint == RESPONSES:
        numbers = _NUMBER.findall(before)
        number = int(numbers[-1]) + 1 if numbers else 0
        event = {"type": "error", "code": "server_error", "message": message, "param": None, "sequence_number": number}
    else:
        return b"data: " + body + b"\n\n" + DONE
    return b"event: error\ndata: " + json.dumps(event).encode() + b"\n\n"

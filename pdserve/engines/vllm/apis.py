"""/v1/responses and /v1/messages over two engines: what differs there from OpenAI's completions. Pure; used by dialect.py.

vLLM takes and returns `kv_transfer_params` on both, so their prefill leg is the same request to the same endpoint, with
one token as its limit: both legs render the prompt alike, whatever the endpoint makes of it.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from pdserve.engines.body import Body

RESPONSES: Final = "/v1/responses"
MESSAGES: Final = "/v1/messages"
_LIMIT: Final = {RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}
_ANSWER_ONLY: Final = {
    RESPONSES: frozenset(("structured_outputs", "top_logprobs", "include", "max_tool_calls", "parallel_tool_calls")),
    MESSAGES: frozenset(("stop_sequences",)),
}
# The object in which the format of the answer is asked for; its other fields shape the prompt.
_FORMAT: Final = {RESPONSES: "text", MESSAGES: "output_config"}
# In JSON text a quote inside a value is escaped, so these can only be keys. Anthropic counts what was cached apart from
# the other input tokens; the usage is flat there.
_USAGE: Final = re.compile(rb'"usage"\s*:\s*\{[^{}]*"cache_read_input_tokens"\s*:\s*\d+[^{}]*\}')
READ: Final = re.compile(rb'("cache_read_input_tokens"\s*:\s*)(\d+)')
_INPUT: Final = re.compile(rb'("input_tokens"\s*:\s*)(\d+)')
_DETAILS: Final = re.compile(rb'("input_tokens_details"\s*:\s*\{[^{}]*?"cached_tokens"\s*:\s*)(?:\d+|null)')


def why_local(endpoint: str, body: Body) -> str | None:
    if endpoint == RESPONSES:
        if body.get("previous_response_id") is not None:
            return "stored-response"  # known only to the consumer that gave it
        if body.get("background") is True:
            return "background"
    return None


def prefill_body(endpoint: str, body: Body, ask: dict[str, bytes]) -> bytes:
    """`ask`: what asks for the handover."""
    changes = {"stream": b"false", _LIMIT[endpoint]: b"1"} | ask
    if endpoint == RESPONSES:
        changes["store"] = b"false"
    if (choice := _unforced(endpoint, body.get("tool_choice"))) is not None:
        changes["tool_choice"] = choice
    remove = set(_ANSWER_ONLY[endpoint])
    where = _FORMAT[endpoint]
    if isinstance(asked := body.get(where), dict) and "format" in asked:
        kept = {key: value for key, value in asked.items() if key != "format"}
        if kept:
            changes[where] = msgspec.json.encode(kept)
        else:
            remove.add(where)
    return body.edited(changes, remove)


def _unforced(endpoint: str, choice: Any) -> bytes | None:
    """One token cannot be a tool call. "none" leaves the tools in the prompt."""
    if endpoint == RESPONSES:
        return b'"none"' if choice == "required" or isinstance(choice, dict) else None
    return b'{"type":"none"}' if isinstance(choice, dict) and choice.get("type") in ("any", "tool") else None


def tell_cached(data: bytes, tokens: int) -> bytes:
    """As dialect.tell_cached, for the usages of these two."""
    if b'"input_tokens_details"' in data:
        data = _DETAILS.sub(rb"\g<1>%d" % tokens, data)
    return _USAGE.sub(lambda found: _usage(found[0], tokens), data) if b'"cache_read_input_tokens"' in data else data


def _usage(usage: bytes, tokens: int) -> bytes:
    read, fresh = READ.search(usage), _INPUT.search(usage)
    if read is None or fresh is None:
        return usage
    told = min(tokens, int(read[2]) + int(fresh[2]))
    left = int(read[2]) + int(fresh[2]) - told
    return _INPUT.sub(rb"\g<1>%d" % left, READ.sub(rb"\g<1>%d" % told, usage), count=1)

"""What vLLM wants in the JSON of the two legs. Pure; used by the proxy.

The prefill leg asks for one token, not streamed (vLLM returns `kv_transfer_params` only then), with everything taken
out that concerns the answer alone: it costs time on the producer, or fails when the answer is cut off after one token
(`min_tokens` above `max_tokens`; a forced tool call or a JSON schema that one token cannot satisfy). Everything that
shapes the *prompt* stays: tools, chat template arguments, documents, truncation, reasoning effort.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from pdserve.engines.body import Body
from pdserve.engines.vllm import apis
from pdserve.engines.vllm.first import first, may_begin
from pdserve.engines.vllm.plain import completion as as_completion
from pdserve.engines.vllm.plain import questions as plain_questions
from pdserve.engines.vllm.plain import tokens
from pdserve.engines.vllm.resume import (
    RESUME_PATH,
    counts_apart,
    detokenize,
    detokenized,
    greedy,
    held_back,
    hide_ids,
    repeatable,
    resumable,
    resume_body,
    stop_strings,
)

__all__ = [
    "RESUME_PATH", "as_completion", "cached_tokens", "counts_apart", "decode_body", "detokenize", "detokenized",
    "early_handover", "first", "greedy", "handed", "held_back", "hide_ids", "may_begin", "plain_questions", "prefill_body",
    "prompt_tokens", "read_handover", "repeatable", "resumable", "resume_body", "stop_strings", "tell_cached", "tokens", "why_local",
]  # fmt: skip

CHAT: Final = "/v1/chat/completions"
PARAMS: Final = "kv_transfer_params"
# vLLM's connectors read these names from the request; null says "the other side is not known yet".
ASK_HANDOVER: Final = (
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,'
    b'"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)
# The consumer waits for chunks of the same prompt instead of for a number of them.
_EARLY: Final = (
    b'{"do_remote_prefill":true,"do_remote_decode":false,"pdserve.expect_s":%g,"remote_engine_id":null,'
    b'"remote_block_ids":[],"remote_host":null,"remote_port":null}'
)
_ANSWER_ONLY: Final = frozenset(
    (
        "min_tokens", "stream_options", "best_of", "echo", "logprobs", "top_logprobs", "prompt_logprobs",
        "logprob_token_ids", "response_format", "structured_outputs",
        "guided_json", "guided_regex", "guided_choice", "guided_grammar",
        "return_token_ids", "return_tokens_as_token_ids", "parallel_tool_calls",
    )
)  # fmt: skip


# In JSON text a quote that belongs to a value is escaped, so these bytes can only be the key itself.
_CACHED: Final = re.compile(rb'("prompt_tokens_details"\s*:\s*)(?:null|(\{\s*"cached_tokens"\s*:\s*)(?:\d+|null))')


_PROMPT_TOKENS: Final = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d+)')
_OTHERS: Final = (apis.RESPONSES, apis.MESSAGES)


class _Handover(msgspec.Struct):
    cached: object = msgspec.field(name="pdserve.cached_tokens", default=None)


class _Reply(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = msgspec.Raw(b"")


class _Cached(msgspec.Struct):
    """What facts.py's handed() gives: tokens that were not computed, by where they came from, and what that took."""

    cached: dict[str, int] = {}
    load_ms: float | None = None
    saved_ms: float | None = None
    load_reason: str = ""


class _Facts(msgspec.Struct):
    facts: _Cached | None = msgspec.field(name="pdserve.facts", default=None)


_reply = msgspec.json.Decoder(_Reply)
_facts = msgspec.json.Decoder(_Facts)
_handover = msgspec.json.Decoder(_Handover)


def why_local(endpoint: str, body: Body) -> str | None:
    """One handover describes one prompt whose every token was computed or loaded as KV."""
    if endpoint in _OTHERS:
        return apis.why_local(endpoint, body)
    if endpoint != CHAT:
        if _several_prompts(body.raw_value("prompt")):
            return "several-prompts"
        if body.get("prompt_embeds") is not None:
            return "prompt-embeds"
        if body.get("echo") is True and body.get("logprobs") is not None:
            return "prompt-logprobs"
        if body.get("max_tokens") == 0:
            return "no-tokens"
    elif body.get("echo") is True and body.get("top_logprobs"):
        return "prompt-logprobs"
    # Logprobs of the prompt exist only where the prompt is computed; a consumer that loads its KV has none to return.
    if body.get("prompt_logprobs") is not None:
        return "prompt-logprobs"
    if body.get("use_beam_search") is True:
        return "beam-search"
    return None


def early_handover(seconds: float) -> bytes:
    return _EARLY % seconds


def prefill_body(endpoint: str, body: Body, push_to: str = "", ids: bool = False) -> bytes:
    ask = b'%b,"pdserve.push_to":%b}' % (ASK_HANDOVER[:-1], msgspec.json.encode(push_to)) if push_to else ASK_HANDOVER
    if endpoint in _OTHERS:
        return apis.prefill_body(endpoint, body, {PARAMS: ask})
    changes = {"stream": b"false", PARAMS: ask}
    changes |= {"return_token_ids": b"true"} if ids else {}
    limits = ("max_completion_tokens", "max_tokens") if endpoint == CHAT else ("max_tokens",)
    given = [name for name in limits if body.get(name) is not None]
    changes |= dict.fromkeys(given or ["max_tokens"], b"1")
    if body.get("n") is not None:
        changes["n"] = b"1"
    # "none" leaves the tools in the prompt (unless vLLM was told otherwise) and needs no tool parser to succeed.
    if (choice := body.get("tool_choice")) == "required" or isinstance(choice, dict):
        changes["tool_choice"] = b'"none"'
    return body.edited(changes, remove=_ANSWER_ONLY - changes.keys())


def read_handover(reply: bytes) -> bytes | None:
    try:
        params = bytes(_reply.decode(reply).kv_transfer_params)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise ValueError(f"the prefill reply is not the JSON object it should be: {exc}") from exc
    if params in (b"", b"null"):
        return None
    if not params.startswith(b"{"):
        raise ValueError(f"{PARAMS} in the prefill reply is not an object")
    return params


def decode_body(endpoint: str, body: Body, handover: bytes | None, ids: bool = False) -> bytes:
    """A client's own kv_transfer_params is never passed on: it names hosts and blocks, which only the proxy may do."""
    changes = {"return_token_ids": b"true"} if ids else {}
    if handover is not None:
        return body.edited(changes | {PARAMS: handover})
    remove = (PARAMS,) if PARAMS in body else ()
    return body.edited(changes, remove) if changes or remove else body.raw


def handed(handover: bytes) -> dict[str, Any] | None:
    """Where the producer's prompt came from: {"cached": {tier: tokens}, "load_ms": .., "saved_ms": .., "load_reason": ..}."""
    try:
        facts = _facts.decode(handover).facts
    except (msgspec.DecodeError, RecursionError):
        return None
    return None if facts is None else msgspec.structs.asdict(facts)


def cached_tokens(handover: bytes) -> int | None:
    """Our connector's word for what the producer found cached. The consumer itself counts everything it was handed."""
    try:
        told = _handover.decode(handover).cached
    except (msgspec.DecodeError, RecursionError):
        return None
    return told if isinstance(told, int) and not isinstance(told, bool) and told >= 0 else None


def prompt_tokens(reply: bytes) -> int | None:
    found, read = _PROMPT_TOKENS.search(reply), apis.READ.search(reply)
    return int(found[1]) + (int(read[2]) if read else 0) if found else None


def tell_cached(data: bytes, tokens: int) -> bytes:
    """vLLM has the details only where it was asked for them; what has none gets none."""
    if b'"prompt_tokens_details"' not in data:
        return apis.tell_cached(data, tokens)

    def put(found: re.Match[bytes]) -> bytes:
        if found[2]:
            return b"%b%b%d" % (found[1], found[2], tokens)
        return b'%b{"cached_tokens":%d}' % (found[1], tokens)

    return _CACHED.sub(put, data)


def _several_prompts(prompt: bytes | None) -> bool:
    """True for a list of texts or of token lists with more than one element; a list of token ids is one prompt."""
    if prompt is None or not prompt.startswith(b"["):
        return False
    if prompt[1:].lstrip()[:1] not in (b'"', b"["):
        return False
    return len(msgspec.json.decode(prompt, type=list[msgspec.Raw])) > 1

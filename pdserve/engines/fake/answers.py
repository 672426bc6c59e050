"""What the fake engine says: one completion, as vLLM would word it, or vLLM's refusal of it."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdserve.engines.fake.server import FakeEngine, Seen


class Refusal(Exception):
    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}
        super().__init__(message)


class Job:
    """One completion: what is asked, what comes out. Raises Refusal where vLLM would."""

    def __init__(self, engine: FakeEngine, seen: Seen) -> None:
        body, self.engine = seen.body, engine
        self.chat = seen.path == "/v1/chat/completions"
        if body.get("model", engine.model) != engine.model:
            raise Refusal(404, f"The model `{body['model']}` does not exist.", "NotFoundError", "model")
        self.stream = bool(body.get("stream"))
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + (seen.request_id or "none")
        self.prompts = _prompts(body, self.chat)
        self.prompt_tokens = sum(map(len, self.prompts))
        self.tokens = int(body.get("max_completion_tokens") or body.get("max_tokens") or engine.max_tokens)
        self._check(body)
        self.n = int(body.get("n") or 1)
        self.usage_asked = bool((body.get("stream_options") or {}).get("include_usage"))
        self.params = body.get("kv_transfer_params") or {}
        self.seed = [zlib.crc32(" ".join(prompt).encode()) % 1000 for prompt in self.prompts]

    def _check(self, body: dict[str, Any]) -> None:
        limit = self.engine.max_model_len
        if self.prompt_tokens + self.tokens > limit:
            needed = self.prompt_tokens + self.tokens
            text = f"This model's maximum context length is {limit} tokens, the request needs {needed}."
            raise Refusal(400, text, param="input_tokens")
        if int(body.get("min_tokens") or 0) > self.tokens:
            raise Refusal(400, "min_tokens must be less than or equal to max_tokens", param="min_tokens")
        if body.get("stream_options") and not self.stream:
            raise Refusal(400, "Stream options can only be defined when `stream=True`.", param="stream_options")
        forced = body.get("tool_choice") == "required" or isinstance(body.get("tool_choice"), dict)
        if self.tokens == 1 and (forced or body.get("response_format")):
            raise Refusal(500, "one token satisfies neither a tool call nor a schema", "InternalServerError")

    def word(self, choice: int, i: int) -> str:
        return f" w{(self.seed[choice // self.n] + i) % 1000}"

    def _choice(self, index: int, text: str, finish: str | None, delta: bool) -> dict[str, Any]:
        content: dict[str, Any] = {"text": text}
        if self.chat:
            content = {"delta" if delta else "message": {"role": "assistant", "content": text}}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish}

    def _frame(self, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": 1, "model": self.engine.model, "choices": choices}

    def usage(self) -> dict[str, Any]:
        out = self.tokens * self.n * len(self.prompts)
        cached = self.prompt_tokens - 1 if self.params.get("do_remote_prefill") else 0
        return {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": out, "total_tokens": self.prompt_tokens + out,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    def reply(self) -> dict[str, Any]:
        total = self.n * len(self.prompts)
        texts = ["".join(self.word(c, i) for i in range(self.tokens)) for c in range(total)]
        choices = [self._choice(c, text, "length", False) for c, text in enumerate(texts)]
        return {**self._frame(choices, False), "usage": self.usage(), "kv_transfer_params": self._handover()}

    def _handover(self) -> dict[str, Any] | None:
        if not (self.params.get("do_remote_decode") and self.engine.hands_over):
            return None
        return {
            "do_remote_prefill": True, "do_remote_decode": False, "pdserve.transfer_id": f"t-{self.id}",
            "pdserve.num_tokens": self.prompt_tokens, "pdserve.source": self.engine.name,
            "pdserve.cached_tokens": self.engine.cached_tokens, "remote_block_ids": [[1, 2]],
        }  # fmt: skip

    async def events(self) -> AsyncIterator[bytes]:
        for i in range(self.tokens):
            if i and self.engine.gap:
                await asyncio.sleep(self.engine.gap)
            for c in range(self.n * len(self.prompts)):
                finish = "length" if i == self.tokens - 1 else None
                yield _event(self._frame([self._choice(c, self.word(c, i), finish, True)], True))
        if self.usage_asked:
            yield _event({**self._frame([], True), "usage": self.usage()})
        yield b"data: [DONE]\n\n"


def _event(frame: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(frame, separators=(",", ":")).encode() + b"\n\n"


def _prompts(body: dict[str, Any], chat: bool) -> list[list[str]]:
    """The prompts as lists of words; token ids count as words."""
    if chat:
        messages = body.get("messages")
        if not isinstance(messages, list):
            raise Refusal(400, "messages: Field required", param="messages")
        return [" ".join(str(m.get("content")) for m in messages).split()]
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt.split()]
    if not isinstance(prompt, list) or not prompt:
        raise Refusal(400, "prompt: Field required", param="prompt")
    if isinstance(prompt[0], int):
        return [[str(t) for t in prompt]]
    return [p.split() if isinstance(p, str) else [str(t) for t in p] for p in prompt]

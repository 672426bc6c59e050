"""What the fake engine says: one completion, as vLLM would word it, or vLLM's refusal of it.

A generated token's id tells which answer it belongs to and its place in it, so a prompt that ends in generated tokens
is gone on with, as a model would.
"""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pdserve.engines.fake.apis import AsChat
    from pdserve.engines.fake.server import FakeEngine, Seen

_GENERATED = 10**9  # ids from here on are generated: _GENERATED + seed * _SPAN + place
_SPAN = 10**6


def said(token: int, shift: int) -> str:
    """The text of a generated token."""
    seed, place = divmod(token - _GENERATED, _SPAN)
    return f" w{(seed + place + shift) % 1000}"


def ids_of(words: list[str], shift: int = 0) -> list[int]:
    """What these words are as tokens; one that an engine has generated can be gone on from."""
    return [_GENERATED + (int(w[1:]) - shift) * _SPAN if re.fullmatch(r"w\d+", w) else _id(w) for w in words]


def _id(word: str) -> int:
    return int(word) if word.isdigit() else zlib.crc32(word.encode()) % _SPAN


class Refusal(Exception):
    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}
        super().__init__(message)


class Step(NamedTuple):
    """One token of one choice, and how much text comes with it."""

    text: str
    token: int
    finish: str | None = None
    stop_reason: str | None = None


class Job:
    """One completion: what is asked, what comes out. Raises Refusal where vLLM would."""

    def __init__(self, engine: FakeEngine, seen: Seen | AsChat) -> None:
        body, self.engine = seen.body, engine
        self.chat = seen.path == "/v1/chat/completions"
        if body.get("model", engine.model) != engine.model:
            raise Refusal(404, f"The model `{body['model']}` does not exist.", "NotFoundError", "model")
        self.stream = bool(body.get("stream"))
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + (seen.request_id or "none")
        self.prompts = _prompts(body, self.chat)
        self.prompt_tokens = sum(map(len, self.prompts))
        self.tokens = int(body.get("max_completion_tokens") or body.get("max_tokens") or engine.max_tokens)
        self.tool = _tool(body)
        self._check(body)
        self.n = int(body.get("n") or 1)
        self.usage_asked = bool((body.get("stream_options") or {}).get("include_usage"))
        self.ids_asked = bool(body.get("return_token_ids"))
        self.params = body.get("kv_transfer_params") or {}
        stop = body.get("stop") or []
        self.stop: list[str] = [stop] if isinstance(stop, str) else stop
        self.stop_shown = body.get("include_stop_str_in_output") is True
        self.least = int(body.get("min_tokens") or 0)
        self.places = [_place(prompt, engine.luck) for prompt in self.prompts]
        self.generated = 0

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
        if self.tokens == 1 and (self.tool or body.get("response_format")):
            raise Refusal(500, "one token satisfies neither a tool call nor a schema", "InternalServerError")

    def steps(self, choice: int) -> Iterator[Step]:
        """As vLLM: with stop strings, the last characters are kept back in case that one has begun in them."""
        seed, place = self.places[choice // self.n]
        keep = 0 if self.stop_shown else max((len(word) for word in self.stop), default=1) - 1
        full, sent = "", 0
        for i in range(self.tokens):
            began, token = len(full), _GENERATED + seed * _SPAN + place + i
            full += self.engine.piece(token, behind_prompt=not i and place > 0)
            self.generated += 1
            self.engine.tokens["generated"] += 1
            for word in self.stop if i >= self.least else ():
                if (at := full.find(word, max(0, began - len(word) + 1))) >= 0:
                    yield Step(full[sent : at + len(word) if self.stop_shown else at], token, "stop", word)
                    return
            last = i == self.tokens - 1
            upto = len(full) if last else max(sent, len(full) - keep)
            yield Step(full[sent:upto], token, ("tool_calls" if self.tool else "length") if last else None)
            sent = upto

    def _delta(self, step: Step, first: bool) -> dict[str, Any]:
        if not self.tool:
            return {"content": step.text}
        named = {"id": f"call-{self.engine.name}", "type": "function"} if first else {}
        function = ({"name": self.tool} if first else {}) | {"arguments": step.text}
        return {"tool_calls": [{**named, "index": 0, "function": function}]}

    def _event(self, choice: int, step: Step, first: bool) -> bytes:
        content = {"delta": self._delta(step, first)} if self.chat else {"text": step.text}
        end: dict[str, Any] = {}
        if step.finish or not self.chat:
            end["stop_reason"] = step.stop_reason
        if not self.chat:
            end["prompt_token_ids"] = self.prompt_ids(choice // self.n) if self.ids_asked and first else None
        end["token_ids"] = [step.token] if self.ids_asked else None
        shown = {"index": choice, **content, "logprobs": None, "finish_reason": step.finish, **end}
        return _event(self._frame([shown], True))

    def _frame(self, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        made = {"id": self.id, "object": kind, "created": self.engine.created, "model": self.engine.model}
        return {**made, "choices": choices}

    def prompt_ids(self, prompt: int) -> list[int]:
        return list(map(_id, self.prompts[prompt]))

    def usage(self) -> dict[str, Any]:
        cached = self.prompt_tokens - 1 if self.params.get("do_remote_prefill") else 0
        return {
            "prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens + self.generated,
            "completion_tokens": self.generated, "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip

    def reply(self) -> dict[str, Any]:
        choices = []
        for c in range(self.n * len(self.prompts)):
            steps = list(self.steps(c))
            text = "".join(step.text for step in steps)
            content: dict[str, Any] = (
                {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            )
            if self.tool:
                content["message"] = {"role": "assistant", "tool_calls": self._delta(Step(text, 0), True)["tool_calls"]}
            ids: dict[str, Any] = {"token_ids": [step.token for step in steps] if self.ids_asked else None}
            if not self.chat:
                ids["prompt_token_ids"] = self.prompt_ids(c // self.n) if self.ids_asked else None
            end = {"finish_reason": steps[-1].finish, "stop_reason": steps[-1].stop_reason}
            choices.append({"index": c, **content, "logprobs": None, **end, **ids})
        prompt = {"prompt_token_ids": self.prompt_ids(0) if self.ids_asked else None} if self.chat else {}
        return {**self._frame(choices, False), "usage": self.usage(), **prompt, "kv_transfer_params": self._handover()}

    def _handover(self) -> dict[str, Any] | None:
        if not (self.params.get("do_remote_decode") and self.engine.hands_over):
            return None
        seed, place = self.places[0]
        first = {"token": _GENERATED + seed * _SPAN + place, "room": self.engine.max_model_len - self.prompt_tokens, "chat": True}
        return {
            **({"pdserve.first": first} if self.engine.tells_first else {}),
            "do_remote_prefill": True, "do_remote_decode": False, "pdserve.transfer_id": f"t-{self.id}",
            "pdserve.num_tokens": self.prompt_tokens, "pdserve.source": self.engine.name,
            "pdserve.cached_tokens": self.engine.cached_tokens, "pdserve.facts": self.engine.facts, "remote_block_ids": [[1, 2]],
        }  # fmt: skip

    async def pieces(self) -> AsyncIterator[Step]:
        """The first choice, as it comes."""
        for n, step in enumerate(self.steps(0)):
            if n and self.engine.gap:
                await asyncio.sleep(self.engine.gap)
            yield step

    async def events(self) -> AsyncIterator[bytes]:
        total = self.n * len(self.prompts)
        if self.chat:
            for c in range(total):
                began = {"index": c, "delta": {"role": "assistant", "content": ""}}
                frame = self._frame([{**began, "logprobs": None, "finish_reason": None}], True)
                yield _event({**frame, "prompt_token_ids": self.prompt_ids(0) if self.ids_asked else None})
        voices = {c: self.steps(c) for c in range(total)}
        first = True
        while voices:
            if not first and self.engine.gap:
                await asyncio.sleep(self.engine.gap)
            for c in list(voices):
                step = next(voices[c], None)
                if step is not None:
                    yield self._event(c, step, first)
                if step is None or step.finish:
                    del voices[c]
            first = False
        if self.usage_asked:
            yield _event({**self._frame([], True), "usage": self.usage()})
        yield b"data: [DONE]\n\n"


def _event(frame: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(frame, separators=(",", ":")).encode() + b"\n\n"


def _place(prompt: list[str], luck: int) -> tuple[int, int]:
    """Which answer follows this prompt, and where in it. `luck` is another one's for each engine, where chance is at work."""
    if prompt and prompt[-1].isdigit() and (code := int(prompt[-1]) - _GENERATED) >= 0:
        return code // _SPAN, code % _SPAN + 1
    return (zlib.crc32(" ".join(prompt).encode()) + luck) % 1000, 0


def _tool(body: dict[str, Any]) -> str:
    """The function that has to be called, if any."""
    choice = body.get("tool_choice")
    if isinstance(choice, dict):
        return str(choice["function"]["name"])
    return str(body["tools"][0]["function"]["name"]) if choice == "required" else ""


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

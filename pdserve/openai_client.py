"""A small OpenAI client for our own tools (verify, demo, bench): it keeps what the official one hides.

Times to the first token, token ids (`return_token_ids`), log-probabilities by token id, cached tokens, response
headers, and a deadline on everything. Synchronous on purpose: its users send one request at a time, or one per thread.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from pdserve.errors import UpstreamError

Prompt = str | Sequence[int]
Message = dict[str, Any]

CONNECT_TIMEOUT = 5.0
DEFAULT_TIMEOUT = 300.0


class ApiError(UpstreamError):
    """The server answered with an HTTP error; `status` and `body` are its own."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token's own log-probability and the best alternatives at that place, by token id."""

    token: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished answer. `ttft` and `total` are seconds on this side; a non-streamed answer has ttft == total."""

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None
    ttft: float
    total: float
    headers: dict[str, str] = field(repr=False)
    raw: dict[str, Any] = field(repr=False)

    @property
    def tpot(self) -> float:
        """Mean time per token after the first; 0 for a single token."""
        return (self.total - self.ttft) / (self.completion_tokens - 1) if self.completion_tokens > 1 else 0.0


class Client:
    """One server: an engine, the proxy, or any other router that speaks OpenAI."""

    def __init__(self, url: str, *, model: str | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout = timeout
        self._model = model
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(timeout, connect=CONNECT_TIMEOUT),
            trust_env=False,
            follow_redirects=False,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    @property
    def model(self) -> str:
        """The model name to send: the one given, else the first that the server lists."""
        if self._model is None:
            listed = self._json("GET", "/v1/models").get("data") or []
            if not listed:
                raise ApiError(503, "the server lists no model", self.url)
            self._model = str(listed[0]["id"])
        return self._model

    def max_model_len(self) -> int:
        """The longest prompt and answer together, as vLLM lists it; a huge number where the server does not say."""
        for entry in self._json("GET", "/v1/models").get("data") or []:
            if entry.get("id") == self.model and entry.get("max_model_len"):
                return int(entry["max_model_len"])
        return 2**31

    def get(self, path: str, timeout: float | None = None) -> httpx.Response:
        return self.request("GET", path, timeout=timeout)

    def request(self, method: str, path: str, *, timeout: float | None = None, **kwargs: Any) -> httpx.Response:
        """One plain request; any status is returned, a transport failure is an UpstreamError."""
        if timeout is not None:
            kwargs["timeout"] = httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT))
        try:
            return self._http.request(method, path, **kwargs)
        except httpx.HTTPError as e:
            raise UpstreamError(502, f"{type(e).__name__}: {e}", self.url) from e

    def healthy(self, timeout: float = 2.0) -> bool:
        try:
            return self.get("/health", timeout=timeout).status_code == 200
        except UpstreamError:
            return False

    def tokenize(self, text: str) -> list[int]:
        """The engine's own token ids of a text (vLLM's /tokenize), without special tokens."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        tokens = self._json("POST", "/tokenize", json=body).get("tokens")
        if not isinstance(tokens, list):
            raise ApiError(501, "it has no /tokenize as vLLM's", self.url)
        return tokens

    def reset_prefix_cache(self, patience: float = 5.0) -> bool:
        """Empties the engine's own prefix cache. False where that is not offered (VLLM_SERVER_DEV_MODE).

        vLLM refuses while a block is still held, which can be for a moment after the last answer: asked again until then.
        """
        deadline = time.monotonic() + patience
        while True:
            answer = self.request("POST", "/reset_prefix_cache", timeout=30)
            if answer.status_code != 200:
                return False
            if not answer.content or answer.json().get("success", True):  # older versions answer with nothing
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)

    def metrics(self) -> dict[str, float]:
        """GET /metrics as {'name{label="value"}': number}; `_created` series are left out."""
        answer = self.get("/metrics", timeout=10)
        self._raise_for_status(answer)
        return parse_metrics(answer.text)

    def complete(self, prompt: Prompt, **options: Any) -> Completion:
        """POST /v1/completions; see `_generate` for the options."""
        value = prompt if isinstance(prompt, str) else list(prompt)
        return self._generate("/v1/completions", {"prompt": value}, **options)

    def chat(self, messages: Sequence[Message], **options: Any) -> Completion:
        """POST /v1/chat/completions; see `_generate` for the options."""
        return self._generate("/v1/chat/completions", {"messages": list(messages)}, **options)

    def _generate(
        self,
        path: str,
        body: dict[str, Any],
        *,
        max_tokens: int = 16,
        logprobs: int = 0,
        stream: bool = True,
        ignore_eos: bool = False,
        timeout: float | None = None,
        request_id: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Completion:
        """A greedy request. `logprobs` is the number of alternatives to return; `extra` goes into the body last."""
        chat = path.endswith("chat/completions")
        full = {"model": self.model, **body, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True}
        if logprobs:
            full |= {"logprobs": True, "top_logprobs": logprobs} if chat else {"logprobs": logprobs}
            full["return_tokens_as_token_ids"] = True
        if ignore_eos:
            full["ignore_eos"] = True
        if stream:
            full |= {"stream": True, "stream_options": {"include_usage": True}}
        full |= extra or {}
        headers = {"X-Request-Id": request_id} if request_id else {}
        limit = timeout or self.timeout
        start = time.perf_counter()
        try:
            if not full.get("stream"):
                answer = self._http.post(
                    path, json=full, headers=headers, timeout=httpx.Timeout(limit, connect=CONNECT_TIMEOUT)
                )
                self._raise_for_status(answer)
                return _from_json(answer.json(), dict(answer.headers), time.perf_counter() - start)
            return self._stream(path, full, headers, limit, start)
        except httpx.HTTPError as e:
            raise UpstreamError(502, f"{type(e).__name__}: {e}", self.url) from e

    def _stream(
        self, path: str, body: dict[str, Any], headers: dict[str, str], limit: float, start: float
    ) -> Completion:
        parts = _Parts()
        timeout = httpx.Timeout(limit, connect=CONNECT_TIMEOUT)
        with self._http.stream("POST", path, json=body, headers=headers, timeout=timeout) as answer:
            if answer.status_code != 200:
                answer.read()
                self._raise_for_status(answer)
            for event in _events(answer):
                now = time.perf_counter() - start
                if now > limit:
                    raise UpstreamError(504, f"no end of the stream after {limit:g} s", self.url)
                if "error" in event:
                    error = event["error"]
                    raise ApiError(
                        int(error.get("code") or 500), str(error.get("message")), self.url, json.dumps(event).encode()
                    )
                parts.add(event, now)
            return parts.finish(dict(answer.headers), time.perf_counter() - start, self.url)

    def _json(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        answer = self.request(method, path, timeout=kwargs.pop("timeout", 30), **kwargs)
        self._raise_for_status(answer)
        return dict(answer.json())

    def _raise_for_status(self, answer: httpx.Response) -> None:
        if answer.status_code == 200:
            return
        raise ApiError(answer.status_code, f"HTTP {answer.status_code} {answer.text[:300]}", self.url, answer.content)


def parse_metrics(text: str) -> dict[str, float]:
    """Prometheus text to a flat dictionary, labels in sorted order."""
    out: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for s in family.samples:
            if not s.name.endswith("_created"):
                labels = ",".join(f'{k}="{v}"' for k, v in sorted(s.labels.items()))
                out[f"{s.name}{{{labels}}}" if labels else s.name] = s.value
    return out


def total(metrics: dict[str, float], name: str, **labels: str) -> float:
    """The sum of a metric's series that carry all the given labels."""
    wanted = [f'{k}="{v}"' for k, v in labels.items()]
    return sum(
        value
        for key, value in metrics.items()
        if (key == name or key.startswith(name + "{")) and all(w in key for w in wanted)
    )


def by_label(metrics: dict[str, float], name: str, label: str) -> dict[str, float]:
    """The sum of a metric's series for each value of one label."""
    out: dict[str, float] = {}
    for key, value in metrics.items():
        found = re.search(rf'[{{,]{label}="([^"]*)"', key) if key.startswith(name + "{") else None
        if found:
            out[found[1]] = out.get(found[1], 0.0) + value
    return out


@dataclass(slots=True)
class _Parts:
    """A streamed answer while it comes in."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    ttft: float | None = None
    last: dict[str, Any] = field(default_factory=dict)

    def add(self, event: dict[str, Any], now: float) -> None:
        self.last = event
        self.usage = event.get("usage") or self.usage
        self.prompt_token_ids += event.get("prompt_token_ids") or []  # chat sends them beside the choices
        for choice in event.get("choices") or []:
            delta = choice.get("delta") or {}
            piece = choice.get("text") or delta.get("content") or ""
            ids = choice.get("token_ids") or []
            if self.ttft is None and (piece or ids):
                self.ttft = now
            self.text.append(piece)
            self.token_ids += ids
            self.prompt_token_ids += choice.get("prompt_token_ids") or []
            self.logprobs += _logprobs(choice.get("logprobs"))
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def finish(self, headers: dict[str, str], elapsed: float, url: str) -> Completion:
        if self.finish_reason is None:
            raise UpstreamError(502, "the stream ended without a finish_reason", url)
        ttft = elapsed if self.ttft is None else self.ttft
        return _completion(self, ttft, elapsed, headers)


def _from_json(answer: dict[str, Any], headers: dict[str, str], elapsed: float) -> Completion:
    """A non-streamed answer: the same shape as one streamed event, with `message` where the event has `delta`."""
    parts = _Parts()
    choices = [{**c, "delta": c.get("message")} for c in answer["choices"][:1]]
    parts.add({**answer, "choices": choices}, elapsed)
    parts.last = answer
    return _completion(parts, elapsed, elapsed, headers)


def _completion(parts: _Parts, ttft: float, elapsed: float, headers: dict[str, str]) -> Completion:
    return Completion(
        text="".join(parts.text),
        token_ids=tuple(parts.token_ids),
        prompt_token_ids=tuple(parts.prompt_token_ids),
        logprobs=tuple(parts.logprobs),
        finish_reason=parts.finish_reason,
        prompt_tokens=parts.usage.get("prompt_tokens", 0),
        completion_tokens=parts.usage.get("completion_tokens", len(parts.token_ids)),
        cached_tokens=_cached(parts.usage),
        ttft=ttft,
        total=elapsed,
        headers=headers,
        raw=parts.last,
    )


def _cached(usage: dict[str, Any]) -> int | None:
    """None where the server does not say (vLLM without --enable-prompt-tokens-details)."""
    details = usage.get("prompt_tokens_details")
    return None if not details else int(details.get("cached_tokens") or 0)


def _events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data:"):
            data = line[5:].strip()
            if data == "[DONE]":
                return
            yield json.loads(data)


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _logprobs(block: dict[str, Any] | None) -> list[TokenLogprob]:
    """Both shapes: completions (parallel lists) and chat (a list of objects), with tokens named by id."""
    if not block:
        return []
    if block.get("content") is not None:
        return [
            TokenLogprob(
                _token_id(c["token"]),
                c["logprob"],
                {_token_id(t["token"]): t["logprob"] for t in c.get("top_logprobs") or []},
            )
            for c in block["content"]
        ]
    tops = block.get("top_logprobs") or [{}] * len(block.get("tokens") or [])
    return [
        TokenLogprob(_token_id(name), value, {_token_id(t): v for t, v in (top or {}).items()})
        for name, value, top in zip(block.get("tokens") or [], block.get("token_logprobs") or [], tops, strict=True)
    ]

"""Going on with a plain text of /v1/responses or /v1/messages by a completion: its events put into the stream's own form.

What the client has is the pattern for what follows: the last piece of text for further pieces, what opened the message for
what closes it. Only streams that are one text so far come here (takeover.OfTyped).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pdserve.proxy import openai, typed
from pdserve.proxy.given import events
from pdserve.proxy.stops import Stops
from pdserve.proxy.typed import Told

_OPENING = {
    openai.MESSAGES: {"message_start", "content_block_start", "ping"},
    openai.RESPONSES: {
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    },
}  # fmt: skip
_PIECE = {openai.MESSAGES: "content_block_delta", openai.RESPONSES: "response.output_text.delta"}


def text_of(endpoint: str, told: Told) -> str | None:
    """The text so far, if one that is still open is all that the client has been given."""
    texts = [(key, text) for key, text in told.texts.items() if text]
    opened = {key[0] for key in told.once}
    if len(texts) != 1 or not opened <= _OPENING[endpoint] or told.last is None or told.opened is None:
        return None
    (key, text), delta = texts[0], told.last["delta"]
    if key[0] != _PIECE[endpoint] or (isinstance(delta, dict) and delta.get("type") != "text_delta"):
        return None
    return text


class Onward:
    """The seam. `tokens` of the answer were generated before; the prompt alone has `prompt`."""

    def __init__(self, endpoint: str, told: Told, text: str, prompt: int, tokens: int, stops: Stops | None) -> None:
        self._told, self._text, self._prompt, self._tokens, self._stops = told, text, prompt, tokens, stops
        self._close = self._message if endpoint == openai.MESSAGES else self._response
        self._count = told.count
        self.over = False

    def feed(self, data: bytes) -> bytes:
        out: list[bytes] = []
        for event in events(data):
            if event["choices"] and not self.over:
                out += map(self._encoded, self._choice(event["choices"][0]))
        return b"".join(out)

    def _encoded(self, event: dict[str, Any]) -> bytes:
        if "sequence_number" in event:
            event["sequence_number"] = self._count
        self._count += 1
        return typed.encoded(event)

    def _choice(self, choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
        ids = len(choice.get("token_ids") or ())
        self._tokens += ids
        text, finish, word = choice["text"], choice["finish_reason"], choice.get("stop_reason")
        if self._stops is not None:
            text, word = self._stops.take(text, ids, finish is not None)
            finish = "stop" if word is not None else finish
        if text:
            self._text += text
            yield self._piece(text)
        if finish is not None:
            self.over = True
            yield from self._close(finish, word if isinstance(word, str) else None)

    def _piece(self, text: str) -> dict[str, Any]:
        assert self._told.last is not None
        delta = self._told.last["delta"]
        return {**self._told.last, "delta": text if isinstance(delta, str) else {**delta, "text": text}}

    def _message(self, finish: str, word: str | None) -> Iterator[dict[str, Any]]:
        assert self._told.last is not None
        yield {"type": "content_block_stop", "index": self._told.last["index"]}
        why = "max_tokens" if finish == "length" else "stop_sequence" if word is not None else "end_turn"
        usage = {
            "input_tokens": self._prompt, "output_tokens": self._tokens,
            "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
        }  # fmt: skip
        yield {"type": "message_delta", "delta": {"stop_reason": why, "stop_sequence": word}, "usage": usage}
        yield {"type": "message_stop"}

    def _response(self, finish: str, word: str | None) -> Iterator[dict[str, Any]]:
        assert self._told.last is not None
        last = self._told.last
        at = {name: last[name] for name in ("content_index", "item_id", "output_index", "sequence_number")}
        part = {**(self._told.part or {}), "text": self._text, "logprobs": None}
        item = {**(self._told.opened or {}), "content": [part], "status": "completed"}
        yield {**at, "logprobs": [], "text": self._text, "type": "response.output_text.done"}
        yield {**at, "part": part, "type": "response.content_part.done"}
        number = {"output_index": last["output_index"], "sequence_number": 0}
        yield {"item": item, **number, "type": "response.output_item.done"}
        short = finish == "length"
        response = {
            **(self._told.response or {}), "output": [item], "status": "incomplete" if short else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if short else None, "usage": self._usage(),
        }  # fmt: skip
        yield {"response": response, "sequence_number": 0, "type": "response.completed"}

    def _usage(self) -> dict[str, Any]:
        turns: list[int] = []
        return {
            "input_tokens": self._prompt,
            "input_tokens_details": {
                "cached_tokens": 0, "cache_write_tokens": 0, "input_tokens_per_turn": turns, "cached_tokens_per_turn": turns,
            },
            "output_tokens": self._tokens,
            "output_tokens_details": {
                "reasoning_tokens": 0, "tool_output_tokens": 0, "output_tokens_per_turn": turns,
                "tool_output_tokens_per_turn": turns,
            },
            "total_tokens": self._prompt + self._tokens,
        }  # fmt: skip

"""Joining a second engine's stream to what the client already has, so that the client sees one stream. Pure.

    Replay   the same request once more: what was given is checked and left out, the rest is passed on
    Resume   a completion that goes on behind the tokens so far: put into the client's own form, counts corrected

Both are fed whole events and return whole events, token ids included, with the first stream's id and time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import msgspec

from pdserve.proxy.given import Given, Mark, Path, events, pieces_of
from pdserve.proxy.stops import Stops

DONE = b"data: [DONE]\n\n"


class Diverged(Exception):
    """The second engine says something else than what the client has been given."""


class Seam(Protocol):
    @property
    def over(self) -> bool:
        """The answer has ended here; nothing that the engine still says is part of it."""

    def feed(self, data: bytes) -> bytes: ...


def encoded(event: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


class Replay:
    over = False

    def __init__(self, given: Given) -> None:
        self._given = given
        self._old = dict(given.parts)
        self._at = dict.fromkeys(self._old, 0)
        self._roles, self._finished = set(given.roles), set(given.finished)

    def feed(self, data: bytes) -> bytes:
        out = [encoded(event) for event in self._rest(data)]
        return b"".join(out) + (DONE if data.endswith(b"[DONE]\n\n") else b"")

    def _rest(self, data: bytes) -> Iterator[dict[str, Any]]:
        for event in events(data):
            event |= self._given.head
            if event.get("prompt_token_ids") and self._given.prompt_ids:
                event["prompt_token_ids"] = None
            if not event["choices"]:
                if not self._given.usage:
                    yield event
                continue
            event["choices"] = [choice for choice in event["choices"] if self._new(choice)]
            if event["choices"]:
                yield event

    def _new(self, choice: dict[str, Any]) -> bool:
        """Leaves in the choice what the client does not have; False if that is nothing."""
        index = choice["index"]
        known = index in self._finished
        had = known or self._pending(index)
        if choice.get("prompt_token_ids") and self._given.prompt_ids:
            choice["prompt_token_ids"] = None
        if index in self._roles and (choice.get("delta") or {}).pop("role", None):
            had = True
        left = False
        for path, piece in list(pieces_of(choice)):
            rest = self._behind((index, path), piece)
            had = had or len(rest) < len(piece)
            left = left or bool(rest)
            if len(rest) < len(piece):
                put(choice, path, rest)
        ended = choice.get("finish_reason") is not None and not known
        if ended and self._pending(index):
            raise Diverged("it ended before the place where the other engine was")
        return left or ended or not had

    def _pending(self, index: int) -> bool:
        return any(self._at[key] < len(old) for key, old in self._old.items() if key[0] == index)

    def _behind(self, key: tuple[int, Path], piece: Any) -> Any:
        """The part of `piece` that lies behind what was given."""
        old = self._old.get(key)
        if old is None or (at := self._at[key]) >= len(old):
            return piece
        n = min(len(piece), len(old) - at)
        before = old[at : at + n]
        if piece[:n] != (before if isinstance(before, str) else list(before)):
            raise Diverged("it answers differently from the engine before it")
        self._at[key] = at + n
        return piece[n:]


def put(choice: dict[str, Any], path: Path, rest: Any) -> None:
    """Sets what is left of a piece."""
    match path:
        case ("tool", number, name):
            call = next(c for c in choice["delta"]["tool_calls"] if c.get("index", 0) == number)
            call["function"][name] = rest
            if name == "name":  # named before, so its id was given too
                for field in ("id", "type"):
                    call.pop(field, None)
                del call["function"]["name"]
        case (("delta" | "logprobs") as part, str(name)):
            choice[part][name] = rest
        case (str(name),):
            choice[name] = rest


class Resume:
    """`ahead` characters of what will come have been given already. With `stops` the engine looks for no stop strings."""

    def __init__(
        self, given: Given, mark: Mark, ahead: int, chat: bool, stops: Stops | None = None, usage: bool = False
    ) -> None:
        self._given, self._chat, self._stops, self._usage = given, chat, stops, usage
        self._prompt = given.prompt_ids.count(b",") + 1
        self._base = mark.ids
        self._tokens = 0
        self._expected = given.text[len(given.text) - ahead :] if ahead else ""
        self.over = False

    def feed(self, data: bytes) -> bytes:
        out = []
        for event in events(data):
            if usage := event.get("usage"):
                self._correct(usage)
            event |= self._given.head
            if not event["choices"]:
                out.append(encoded(event))
                continue
            choice = self._choice(event["choices"][0])
            if choice is not None:
                event["choices"] = [choice]
                out.append(encoded(event))
            if self.over:
                return b"".join((*out, *self._end(), DONE))
        return b"".join(out) + (DONE if data.endswith(b"[DONE]\n\n") else b"")

    def _choice(self, choice: dict[str, Any]) -> dict[str, Any] | None:
        ids = choice.get("token_ids") or ()
        self._tokens += len(ids)
        choice["prompt_token_ids"] = None
        text = self._stopped(choice, len(ids))
        if self._expected:
            n = min(len(text), len(self._expected))
            if text[:n] != self._expected[:n]:
                raise Diverged("it goes on differently from the engine before it")
            text, self._expected = text[n:], self._expected[n:]
            if not text and choice["finish_reason"] is None:
                self._given.again(ids)
                return None
        if not self._chat:
            choice["text"] = text
            return choice
        made = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": choice["finish_reason"]}
        end = {"stop_reason": choice.get("stop_reason")} if choice["finish_reason"] else {}
        return {**made, **end, "token_ids": choice.get("token_ids")}

    def _stopped(self, choice: dict[str, Any], ids: int) -> str:
        """The event's text, as far as it may be given; a stop string that is found ends the answer."""
        text: str = choice["text"]
        if self._stops is None:
            return text
        text, word = self._stops.take(text, ids, choice["finish_reason"] is not None)
        if word is not None:
            choice |= {"finish_reason": "stop", "stop_reason": word}
            self.over = True
        return text

    def _end(self) -> Iterator[bytes]:
        if not self._usage:
            return
        usage: dict[str, Any] = {"completion_tokens": self._tokens, "prompt_tokens_details": None}
        self._correct(usage)
        yield encoded({**self._given.head, "choices": [], "usage": usage})

    def _correct(self, usage: dict[str, Any]) -> None:
        """Tokens that were moved into the prompt are the answer's."""
        usage["prompt_tokens"] = self._prompt
        usage["completion_tokens"] += self._base
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        if details := usage.get("prompt_tokens_details"):
            details["cached_tokens"] = min(details.get("cached_tokens") or 0, self._prompt)

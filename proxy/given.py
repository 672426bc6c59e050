"""What a client has been given of one stream of choices (/v1/completions, chat): the sums over its events."""

from __future__ import annotations

import re
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from pdserve.proxy.kept import Foreign, Kept

Path = tuple[str | int, ...]
_IDS: tuple[int, Path] = (0, ("token_ids",))
_PROMPT_IDS = re.compile(rb'"prompt_token_ids":(\[[0-9,]*\])')
_decoder = msgspec.json.Decoder(dict[str, Any])


class Mark(NamedTuple):
    """A place where text and tokens are in step: so many ids, so many characters."""

    ids: int
    chars: int


class Given(Kept):
    """The sums over one stream. Choices are known by their index, what they are made of by a path within the choice."""

    def __init__(self) -> None:
        super().__init__()
        self.head: dict[str, Any] = {}  # id, object, created and model: the same in every event
        self.prompt_ids = b""  # as the JSON list it came in
        self.marks: deque[Mark] = deque(maxlen=512)
        self._in_step: list[tuple[int, int]] = []  # ids and characters of the first choice, event by event
        self._summed = (0, 0)
        self.parts: dict[tuple[int, Path], Any] = {}
        self.roles: set[int] = set()
        self.finished: set[int] = set()
        self.usage = False

    def _read(self, raw: bytes) -> None:
        if not self.prompt_ids and (found := _PROMPT_IDS.search(raw)):
            self.prompt_ids = found[1]
            raw = raw[: found.start(1)] + b"null" + raw[found.end(1) :]
        new: dict[tuple[int, Path], list[Any]] = {}
        try:
            for event in events(raw):
                self._take(event, new)
        except Foreign:
            self.foreign = True
        for key, pieces in new.items():
            self.parts[key] = joined([self.parts[key], *pieces] if key in self.parts else pieces)
            if key[1] == ("token_ids",):
                self.parts[key] = array("q", self.parts[key])
        self._fold_marks()

    def _take(self, event: dict[str, Any], new: dict[tuple[int, Path], list[Any]]) -> None:
        self.head = self.head or {name: event.get(name) for name in ("id", "object", "created", "model")}
        self.usage = self.usage or (not event["choices"] and bool(event.get("usage")))
        for choice in event["choices"]:
            index, text = choice["index"], ""
            for path, piece in pieces_of(choice):
                new.setdefault((index, path), []).append(piece)
                if path in (("text",), ("delta", "content")):
                    text = piece
            if (choice.get("delta") or {}).get("role"):
                self.roles.add(index)
            if choice.get("finish_reason") is not None:
                self.finished.add(index)
            if index == 0 and (ids := choice.get("token_ids")):
                self._in_step.append((len(ids), len(text)))

    def _fold_marks(self) -> None:
        ids, chars = self._summed
        for new_ids, new_chars in self._in_step:
            ids, chars = ids + new_ids, chars + new_chars
            if new_chars and new_ids == 1:  # of several tokens the last one's text may be still to come
                self.marks.append(Mark(ids, chars))
        self._summed = ids, chars
        self._in_step.clear()

    @property
    def text(self) -> str:
        """The first choice's."""
        return self.parts.get((0, ("text",)), "") or self.parts.get((0, ("delta", "content")), "")

    @property
    def ids(self) -> Sequence[int]:
        """The first choice's."""
        return self.parts.get(_IDS, ())

    def nothing(self, ids: bool) -> bool:
        """No part of an answer, though perhaps a role, has been given. `ids`: token ids are part of an answer."""
        shown = (value for key, value in self.parts.items() if ids or key[1] != ("token_ids",))
        return not any(shown) and not self.finished

    def restart(self) -> None:
        """Forgets all but the beginning: the answer will come anew."""
        self.parts.clear()
        self.marks.clear()
        self._summed = (0, 0)

    @property
    def plain(self) -> bool:
        """The answer so far is one choice's text and nothing else."""
        texts = {(0, ("text",)), (0, ("delta", "content")), (0, ("token_ids",))}
        return all(key in texts for key, value in self.parts.items() if value)

    def rewind(self, mark: Mark) -> None:
        """Takes back the ids behind `mark`, which will come once more. Text that was given stays given."""
        del self.parts[_IDS][mark.ids :]
        self._summed = mark.ids, self._summed[1]
        while self.marks and self.marks[-1].ids > mark.ids:
            self.marks.pop()

    def again(self, ids: Sequence[int]) -> None:
        """Ids that have come once more without text that is new."""
        self.parts[_IDS].extend(ids)
        self._summed = len(self.parts[_IDS]), self._summed[1]


def events(raw: bytes) -> Iterator[dict[str, Any]]:
    """The decoded events of whole SSE bytes; [DONE] is left out. Raises Foreign."""
    for piece in raw.replace(b"\r\n", b"\n").split(b"\n\n"):
        piece = piece.strip()
        if not piece or piece == b"data: [DONE]":
            continue
        try:
            event = _decoder.decode(piece.removeprefix(b"data:"))
            if not isinstance(event["choices"], list):
                raise Foreign
        except (msgspec.DecodeError, KeyError, RecursionError) as exc:
            raise Foreign from exc
        yield event


def pieces_of(choice: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """What of a choice grows from event to event: texts and lists, each with its path."""
    if isinstance(text := choice.get("text"), str):
        yield ("text",), text
    delta = choice.get("delta") or {}
    for name, value in delta.items():
        if isinstance(value, str) and name != "role":
            yield ("delta", name), value
    for call in delta.get("tool_calls") or ():
        for name, value in (call.get("function") or {}).items():
            if isinstance(value, str):
                yield ("tool", call.get("index", 0), name), value
    for name, value in (choice.get("logprobs") or {}).items():
        if isinstance(value, list):
            yield ("logprobs", name), value
    if ids := choice.get("token_ids"):
        yield ("token_ids",), ids


def joined(pieces: list[Any]) -> Any:
    return "".join(pieces) if isinstance(pieces[0], str) else [item for piece in pieces for item in piece]

"""Streams of typed events (/v1/responses, /v1/messages): what a client has been given of one, and joining another to it.

Each event says what it is about: an output item or a content block, and a part of it. Some carry a piece of text or of
arguments, which grows; of the others, which open and close things, each comes once. So a second engine's stream of the
same answer is followed until it has said all that was given: what opens or closes something known is left out, known
text is compared and left out. From there on its events are passed on under the first stream's ids and time, with the
numbers that follow. What /v1/completions and chat have instead is in given.py and seam.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from pdserve.proxy.kept import Foreign, Kept
from pdserve.proxy.seam import Diverged

Key = tuple[Any, ...]
Ids = dict[tuple[str | int, ...], str]
_PLACE = ("output_index", "index", "content_index", "summary_index")
_ID_NAMES = frozenset(("id", "item_id", "call_id"))
_GROWS = ("text", "thinking", "partial_json")  # in a block's delta
_OPENED = ("content_block", "item", "part")
_decoder = msgspec.json.Decoder(dict[str, Any])


def events(raw: bytes) -> Iterator[dict[str, Any]]:
    """The decoded events of whole SSE bytes. Raises Foreign."""
    for piece in raw.replace(b"\r\n", b"\n").split(b"\n\n"):
        data = piece[piece.find(b"data:") + 5 :].strip() if b"data:" in piece else b""
        if not data:
            if piece.strip():
                raise Foreign
            continue
        try:
            event = _decoder.decode(data)
        except (msgspec.DecodeError, RecursionError) as exc:
            raise Foreign from exc
        if not isinstance(event.get("type"), str):
            raise Foreign
        yield event


def encoded(event: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), msgspec.json.encode(event))


def piece_of(event: dict[str, Any]) -> tuple[Key, str] | None:
    """The text by which something grows, and what that is; None for an event that comes once."""
    delta = event.get("delta")
    if isinstance(delta, str):
        return _key(event), delta
    if isinstance(delta, dict):
        for name in _GROWS:
            if isinstance(text := delta.get(name), str):
                return (*_key(event), name), text
    return None


def _key(event: dict[str, Any]) -> Key:
    return (event["type"], *(event.get(name) for name in _PLACE))


def once_of(event: dict[str, Any]) -> Key:
    """What an event that comes once is about; what it opens belongs to it."""
    delta = event.get("delta")
    kind = delta.get("type") if isinstance(delta, dict) else None
    opened = next((part for name in _OPENED if isinstance(part := event.get(name), dict)), {})
    return (*_key(event), kind, opened.get("type"), opened.get("name"))


def ids_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every id in an event, with the way to it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in _ID_NAMES and isinstance(inner, str):
                yield (*path, name), inner
            elif isinstance(inner, dict | list):
                yield from ids_of(inner, (*path, name))
    elif isinstance(value, list):
        for n, inner in enumerate(value):
            yield from ids_of(inner, (*path, n))


class Told(Kept):
    """The sums over one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0  # events
        self.once: dict[Key, Ids] = {}
        self.texts: dict[Key, str] = {}
        # Patterns for what follows: the last piece, and what opened the last item or block, its part, and the response.
        self.last: dict[str, Any] | None = None
        self.opened: dict[str, Any] | None = None
        self.part: dict[str, Any] | None = None
        self.response: dict[str, Any] | None = None
        self.prompt = 0  # its tokens, as far as they have been told

    def _read(self, raw: bytes) -> None:
        new: dict[Key, list[str]] = {}
        try:
            for event in events(raw):
                self.count += 1
                if (piece := piece_of(event)) is not None:
                    new.setdefault(piece[0], []).append(piece[1])
                    self.last = event
                else:
                    self.once[once_of(event)] = dict(ids_of(event))
                    self._take(event)
        except Foreign:
            self.foreign = True
        for key, pieces in new.items():
            self.texts[key] = self.texts.get(key, "") + "".join(pieces)

    def _take(self, event: dict[str, Any]) -> None:
        match event:
            case {"response": dict(response)}:
                self.response = self.response or response
            case {"item": dict(opened)} | {"content_block": dict(opened)}:
                self.opened = opened
            case {"part": dict(part)}:
                self.part = part
            case {"message": {"usage": dict(usage)}}:
                counts = (usage.get("input_tokens"), usage.get("cache_read_input_tokens"))
                self.prompt = sum(count for count in counts if isinstance(count, int))

    @property
    def nothing(self) -> bool:
        """No part of an answer has been given, though perhaps its beginning has."""
        return not any(self.texts.values())

    def has(self, kind: str) -> bool:
        return any(key[0] == kind for key in self.once)


class Again:
    """The seam for the same request asked once more."""

    over = False

    def __init__(self, told: Told) -> None:
        self._told = told
        self._texts = {key: text for key, text in told.texts.items() if text}
        self._unmet = dict(told.once)
        self._names: dict[str, str] = {}
        self._count = told.count

    def feed(self, data: bytes) -> bytes:
        return b"".join(encoded(event) for event in map(self._event, events(data)) if event is not None)

    def _event(self, event: dict[str, Any]) -> dict[str, Any] | None:
        """What the client is to get of it, if anything."""
        piece = piece_of(event)
        if piece is None:
            if (ids := self._unmet.pop(once_of(event), None)) is not None:
                self._rename(ids, dict(ids_of(event)))
                return None
            if event["type"] == "ping":
                return None
        elif known := self._texts.pop(piece[0], ""):
            key, text = piece
            n = min(len(known), len(text))
            if text[:n] != known[:n]:
                raise Diverged("it answers differently from the engine before it")
            if known[n:]:
                self._texts[key] = known[n:]
            if not text[n:]:
                return None
            _put(event, text[n:], bool(n))
        if self._texts or self._unmet:
            raise Diverged("it says something else at the place where the other engine was")
        return self._ours(event)

    def _rename(self, ours: Ids, theirs: Ids) -> None:
        for path, theirs_id in theirs.items():
            if (our_id := ours.get(path)) is not None:
                self._names[theirs_id] = our_id

    def _ours(self, event: dict[str, Any]) -> dict[str, Any]:
        if isinstance(response := event.get("response"), dict) and "created_at" in response:
            response["created_at"] = (self._told.response or {}).get("created_at")
        if "sequence_number" in event:
            event["sequence_number"] = self._count
        self._count += 1
        for path, theirs in list(ids_of(event)):
            if theirs in self._names:
                at: Any = event
                for step in path[:-1]:
                    at = at[step]
                at[path[-1]] = self._names[theirs]
        return event


def _put(event: dict[str, Any], rest: str, cut: bool) -> None:
    """Leaves `rest` of the event's text. Whose log probabilities those are that come with it can no longer be told where
    it was cut."""
    delta = event["delta"]
    if isinstance(delta, str):
        event["delta"] = rest
        if cut and event.get("logprobs"):
            raise Diverged("its log probabilities are cut otherwise than those of the engine before it")
        return
    delta[next(name for name in _GROWS if isinstance(delta.get(name), str))] = rest

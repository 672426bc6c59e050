"""A consumer's answer to a whole request, joined behind a first token that is the producer's and that the client has.

Both engines compute that token. Nearly always it is the same, and then the consumer's stream goes on as it came, without
being read any further: its bytes are passed on, with the first events' id and time. Where it is another one (chance,
or two tokens as good as each other), the client has been told one of them: `Differs`, and the consumer is asked for what
follows that one. Pure.
"""

from __future__ import annotations

from typing import Any

from pdserve.proxy.given import Given, events, pieces_of
from pdserve.proxy.seam import DONE, Diverged, encoded

_PROMPT_IDS = b'"prompt_token_ids":['  # in JSON text a quote inside a value is escaped, so this can only be the key
_HEAD = ("id", "created")


class Differs(Exception):
    """The consumer would begin the answer with another token."""


class Behind:
    """The seam. `given` is the first token, of the client's stream all that there is."""

    over = False

    def __init__(self, given: Given, token: int) -> None:
        self._given, self._token, self._text = given, token, given.text
        self._seen = False  # the consumer's first token, and it is the same
        self._swaps: list[tuple[bytes, bytes]] | None = None

    @property
    def joined(self) -> bool:
        """From here on the consumer's events are the client's."""
        return self._seen and not self._text

    def feed(self, data: bytes) -> bytes:
        if self.joined:
            return self._renamed(data)
        *pieces, rest = data.replace(b"\r\n", b"\n").split(b"\n\n")
        out = []
        for n, piece in enumerate(pieces):
            if self.joined:
                return b"".join(out) + self._renamed(b"\n\n".join((*pieces[n:], rest)))
            out.append(self._first(piece))
        return b"".join(out)

    def _first(self, piece: bytes) -> bytes:
        """What is left of an event from the beginning of the consumer's answer."""
        if (at := piece.find(_PROMPT_IDS)) >= 0:
            # A client that asked for them has them from the producer; reading them would take longer than all the rest.
            begin, end = at + len(_PROMPT_IDS) - 1, piece.find(b"]", at) + 1
            if not end:
                raise Diverged("its first event is not whole")
            self._given.prompt_ids = self._given.prompt_ids or piece[begin:end]
            piece = piece[:begin] + b"null" + piece[end:]
        event = next(events(piece), None)
        if event is None or not event["choices"]:
            raise Diverged("it ended before its first token")
        if self._swaps is None:
            self._swaps = [(_member(event, name), _member(self._given.head, name)) for name in _HEAD]
            self._swaps = [(theirs, ours) for theirs, ours in self._swaps if theirs != ours]
        choice = event["choices"][0]
        left = self._token_taken(choice)
        left = self._text_taken(choice) or left
        if not left and choice.get("finish_reason") is None:
            return b""
        return encoded(event | self._given.head)

    def _token_taken(self, choice: dict[str, Any]) -> bool:
        """Takes the first token out; whether others are left."""
        ids = choice.get("token_ids") or []
        if ids and not self._seen:
            if ids[0] != self._token:
                raise Differs
            self._seen = True
            choice["token_ids"] = ids = ids[1:]
        return bool(ids)

    def _text_taken(self, choice: dict[str, Any]) -> bool:
        """Takes out what the client has; whether something is left."""
        delta, left = choice.get("delta"), False
        if delta is not None:
            delta.pop("role", None)
        for path, piece in list(pieces_of(choice)):
            if path == ("token_ids",) or not piece:
                continue
            if path not in (("text",), ("delta", "content")):
                raise Diverged("it answers in another form than plain text")
            n = min(len(piece), len(self._text))
            if piece[:n] != self._text[:n]:
                raise Diverged("the same token reads differently")
            self._text = self._text[n:]
            (delta if delta is not None else choice)[path[-1]] = piece[n:]
            left = left or n < len(piece)
        return left

    def _renamed(self, data: bytes) -> bytes:
        """Keys cannot be mistaken: in JSON text a quote that belongs to a value is escaped."""
        for theirs, ours in self._swaps or ():
            data = data.replace(theirs, ours)
        return data


def tokens_to_text(data: bytes) -> list[int] | None:
    """The tokens of a resumed stream up to its first text; None while it has said none and not ended."""
    ids: list[int] = []
    for event in events(data):
        for choice in event["choices"]:
            ids += choice.get("token_ids") or ()
            if choice["text"] or choice["finish_reason"] is not None:
                return ids
    return None


def with_text(data: bytes, text: str) -> bytes:
    """The same with another first text: so much of `text`, which is all that its tokens say, as the engine shows of it."""
    out, right = [], False
    for event in events(data):
        shown = event["choices"][0]["text"] if event["choices"] else ""
        if shown and not right:
            event["choices"][0]["text"], right = text[: text.rfind(shown[-1]) + 1], True
        out.append(encoded(event))
    return b"".join(out) + (DONE if data.endswith(DONE) else b"")


def _member(event: dict[str, Any], name: str) -> bytes:
    """As engines write it; where one writes it otherwise, it stays."""
    return encoded({name: event.get(name)})[len(b"data: {") : -len(b"}\n\n")] + b","

"""The first token's text without the whole prompt's.

vLLM makes text of tokens with tokenizers' DecodeStream, and gives it the prompt's tokens, because the text of a token can
depend on those before it. With its first token the stream decodes all of them, twice: 39 ms of one core for 20000, between the
engine's answer and the client's, in every request. The last few say as much, if they begin where a character does.
vLLM looks the class up in its module so that others may put theirs there; this does, where the connector is used.
"""

from __future__ import annotations

from typing import Any

#: tokens of the prompt that are decoded; a character has at most four bytes, so it begins within four tokens before
KEPT, ALIGN = 64, 4
#: what stands in a text for bytes that are no character
_BROKEN = "\ufffd"


class Primed:
    """A DecodeStream that has seen the prompt `ids`, as far as that matters."""

    def __init__(self, whole: type, ids: list[int], skip_special_tokens: bool) -> None:
        self._whole, self._ids, self._skip = whole, ids, skip_special_tokens

    def step(self, tokenizer: Any, token: Any) -> Any:
        """The text that `token` adds, or None while it adds none."""
        kept = ending(self._ids, lambda ids: tokenizer.decode(ids, skip_special_tokens=self._skip))
        stream = self._whole(ids=kept, skip_special_tokens=self._skip)
        self.step = stream.step  # type: ignore[method-assign]
        self._ids = []
        return stream.step(tokenizer, token)


def ending(ids: list[int], decode: Any) -> list[int]:
    """As few of the last ids as say what all would. Where that is not plain to see, all."""
    for count in range(KEPT, min(KEPT + ALIGN, len(ids))):
        # A cut within a character leaves bytes that are none.
        text = decode(ids[-count:])
        if text and _BROKEN not in text:
            return ids[-count:]
    return ids


def install() -> None:
    """From now on in this process; more than once is once."""
    from tokenizers import decoders

    whole = decoders.DecodeStream
    if getattr(whole, "primed", False):
        return

    def stream(ids: list[int] | None = None, skip_special_tokens: bool = False) -> Any:
        if ids is None or len(ids) <= KEPT + ALIGN:
            return whole(ids=ids, skip_special_tokens=skip_special_tokens)
        return Primed(whole, ids, skip_special_tokens)

    stream.primed = True  # type: ignore[attr-defined]
    decoders.DecodeStream = stream  # type: ignore[misc, assignment]

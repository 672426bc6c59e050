"""Stop strings where an answer is put together from two engines' texts: looked for as vLLM does, here. Pure.

An engine that goes on with an answer knows nothing of the text before its own, in which a stop string may have begun.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


class Stops:
    """`shown` is the end of what the client has; `hidden` comes behind it, is generated, and is still to be given."""

    def __init__(self, words: Sequence[str], kept: bool, least: int, shown: str = "", hidden: str = "") -> None:
        """`kept`: a stop string stays in the text. `least`: tokens within which none is looked for."""
        self._words, self._kept, self._least = words, kept, least
        self._back = max(map(len, words)) - 1  # characters in which one may have begun
        self._hold = 0 if kept else self._back
        self._text = shown + hidden
        self._given = len(shown)
        self._tokens = 0

    def take(self, new: str, tokens: int, last: bool) -> tuple[str, str | None]:
        """Text for the client now, and the stop string that ends it, if one does. `last`: the engine says no more."""
        self._text += new
        self._tokens += tokens
        found = self._found(len(new)) if new and self._tokens > self._least else None
        if found is not None:
            word, end = found
            return self._give(end if self._kept else end - len(word)), word
        out = self._give(len(self._text) if last else len(self._text) - self._hold)
        known = max(min(self._given, len(self._text) - self._back), 0)
        self._text, self._given = self._text[known:], self._given - known
        return out, None

    def _found(self, new: int) -> tuple[str, int] | None:
        """The stop string that is complete first, and where it ends."""
        best: tuple[str, int] | None = None
        for word in self._words:
            at = self._text.find(word, max(0, len(self._text) - new - len(word) + 1))
            if at >= 0 and at + len(word) < (best[1] if best else sys.maxsize):
                best = word, at + len(word)
        return best

    def _give(self, upto: int) -> str:
        out = self._text[self._given : max(upto, 0)]
        self._given = max(self._given, upto)
        return out

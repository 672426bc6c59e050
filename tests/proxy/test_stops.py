"""A text in two parts must end where the same text in one part does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdserve.proxy.stops import Stops

TOKENS = st.lists(st.text("ab.", min_size=0, max_size=3), min_size=1, max_size=14)
WORDS = st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3)


def told(stops: Stops, tokens: list[str]) -> tuple[str, str | None, int]:
    out = ""
    for n, token in enumerate(tokens, 1):
        text, word = stops.take(token, 1, last=n == len(tokens))
        out += text
        if word is not None:
            return out, word, n
    return out, None, len(tokens)


def by_hand(tokens: list[str], words: list[str], kept: bool, least: int) -> tuple[str, str | None, int]:
    """Token by token: is one of the words complete now that was not before?"""
    text = ""
    for n, token in enumerate(tokens, 1):
        before, text = text, text + token
        ends = [
            (at + len(word), place, word)
            for place, word in enumerate(words)
            if (at := text.find(word, max(0, len(before) - len(word) + 1))) >= 0
        ]
        if token and ends and n > least:
            end, _, word = min(ends)
            return text[: end if kept else end - len(word)], word, n
    return text, None, len(tokens)


@given(TOKENS, WORDS, st.booleans(), st.integers(0, 4))
def test_one_part(tokens: list[str], words: list[str], kept: bool, least: int) -> None:
    assert told(Stops(words, kept, least), tokens) == by_hand(tokens, words, kept, least)


@given(TOKENS, WORDS, st.booleans(), st.integers(0, 4), st.integers(1, 13))
def test_two_parts(tokens: list[str], words: list[str], kept: bool, least: int, cut: int) -> None:
    whole = by_hand(tokens, words, kept, least)
    cut = min(cut, whole[2] - 1)  # the engine died before the end
    full = "".join(tokens[:cut])
    hold = 0 if kept else max(map(len, words)) - 1
    given_ = full[: max(0, len(full) - hold)]
    shown = given_[-max(map(len, words)) :] if kept else ""
    stops = Stops(words, kept, least - cut, shown, full[len(given_) :])
    text, word, used = told(stops, tokens[cut:])
    assert (given_ + text, word, cut + used) == whole


def test_what_is_remembered_is_bounded() -> None:
    stops = Stops(["never"], False, 0)
    for _ in range(1000):
        stops.take("abcdef", 1, False)
    assert len(stops._text) < 50

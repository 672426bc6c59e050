"""The prompts that verify, the end-to-end tests and the benchmarks send: made from a seed, exact in tokens.

A prompt of n tokens is the seed's own text, tokenised by the engine and cut to n ids, so that chunk and block borders
are met exactly and no earlier run has seen it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.openai_client import Client, Completion, Message

# One token; around the 16-token page, the 256-token chunk and two of them; one prefill step; more than one step.
LENGTHS = (1, 15, 16, 17, 255, 256, 257, 511, 512, 513, 1000, 3000)
QUICK_LENGTHS = (1, 16, 17, 257, 513)
SHARED_PREFIX = 300

_NOUNS = [
    "river",
    "bridge",
    "letter",
    "window",
    "garden",
    "engine",
    "winter",
    "market",
    "silver",
    "captain",
    "mountain",
]
_NOUNS += ["lantern", "harbour", "teacher", "island", "orchard", "machine", "village", "thunder", "carpet", "compass"]
_VERBS = [
    "crossed",
    "carried",
    "followed",
    "painted",
    "remembered",
    "opened",
    "answered",
    "measured",
    "repaired",
    "lost",
]
_ADJECTIVES = [
    "quiet",
    "broken",
    "early",
    "distant",
    "golden",
    "narrow",
    "careful",
    "heavy",
    "patient",
    "hollow",
    "cold",
]
_PLACES = ["near the mill", "behind the station", "under the old roof", "before sunrise", "after the storm", "at night"]
_UNICODE = (
    "Grüße aus Köln — naïve café, «Ελληνικά», עברית, العربية, हिन्दी, 東京は夜の七時、北京烤鸭, 한국어 문장. "
    "Emoji: 🚀 👩‍👩‍👧 🇫🇷 e\u0301 (combined), zero\u200bwidth, \u202eright to left\u202c, math ∑ᵢ xᵢ² ≤ ½."
)


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt: token ids, text, or chat messages; exactly one of the three is set."""

    name: str
    ids: tuple[int, ...] | None = None
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    stream: bool = True

    def send(self, client: Client, **options: Any) -> Completion:
        options.setdefault("stream", self.stream)
        if self.messages is not None:
            return client.chat(self.messages, **options)
        return client.complete(self.ids if self.ids is not None else self.text or "", **options)


def story(rng: random.Random, words: int) -> str:
    """Plain English sentences, different for every state of `rng`."""
    out: list[str] = []
    while len(out) < words:
        a, b = rng.sample(_NOUNS, 2)
        sentence = (
            f"The {rng.choice(_ADJECTIVES)} {a} {rng.choice(_VERBS)} the {rng.choice(_ADJECTIVES)} {b} "
            f"{rng.choice(_PLACES)}, {rng.randrange(2, 99)} times."
        )
        out += sentence.split(" ")
    return " ".join(out[:words])


def make_ids(rng: random.Random, tokenize: Callable[[str], list[int]], count: int) -> tuple[int, ...]:
    """Exactly `count` token ids of a fresh story."""
    ids = tokenize(story(rng, count + 16))  # no tokenizer joins words, so that a word is at least one token
    return tuple(ids[:count])


def suite(
    seed: int, tokenize: Callable[[str], list[int]], *, lengths: Sequence[int] = LENGTHS, max_prompt: int = 10**9
) -> list[Case]:
    """The cases of `pdserve verify`: every length that fits, a shared prefix, unicode, a chat with a system prompt."""
    rng = random.Random(seed)
    cases = [Case(f"{n} tokens", ids=make_ids(rng, tokenize, n)) for n in lengths if n <= max_prompt]
    prefix = make_ids(rng, tokenize, SHARED_PREFIX)
    for side in "AB":
        cases.append(Case(f"shared {SHARED_PREFIX}, {side}", ids=prefix + make_ids(rng, tokenize, 60)))
    cases.append(Case("unicode", text=f"{story(rng, 12)}\n{_UNICODE * 3}\nRepeat the last sentence:"))
    system = {"role": "system", "content": f"You answer in one short sentence. {story(rng, 220)}"}
    question = {"role": "user", "content": "What is the capital of France?"}
    cases.append(Case("chat, system", messages=(system, question)))
    cases.append(Case("chat, no stream", messages=({**system, "content": story(rng, 150)}, question), stream=False))
    return cases

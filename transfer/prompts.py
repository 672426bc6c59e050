"""The latest prompts, by their marks: which of them is most like a new one, and up to which token. Pure and bounded.

Only marks are known here, never tokens (pdserve/marks.py). A prompt is looked up by the marks at the ends of its chunks,
the longest first, so that it is compared with a handful of others and not with all.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import NamedTuple

from pdserve import marks
from pdserve.transfer.telling import EDGE_BYTES

MOST, MOST_BYTES = 1024, 16 << 20
_COMPARED = 8  # prompts of either kind that a new one is compared with
_LATEST = 32  # those that are looked at where not even the first chunk is known


@dataclass(slots=True)
class Prompt:
    leg: str
    request: str
    instance: str
    at: float
    root: tuple[bytes, str, bytes]  # model and layout, adapter, salt's tag
    asked: int  # tokens of the prompt alone
    tokens: int  # and of the answer, as far as it is known
    marks: bytes
    edges: bytes

    @property
    def size(self) -> int:
        return len(self.marks) + 3 * len(self.edges) + 400


class Like(NamedTuple):
    """`common`: tokens from the start that are equal."""

    prompt: Prompt
    common: int


class Prompts:
    def __init__(self, most: int = MOST, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._prompts: OrderedDict[str, Prompt] = OrderedDict()
        self._edges: dict[bytes, deque[Prompt]] = {}
        self._size = 0

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def size(self) -> int:
        return self._size

    def add(self, prompt: Prompt) -> None:
        """Takes the place of what is known of the same leg."""
        self._remove(self._prompts.pop(prompt.leg, None))
        self._prompts[prompt.leg] = prompt
        self._size += prompt.size
        for edge in _edges(prompt):
            self._edges.setdefault(edge, deque(maxlen=_COMPARED)).append(prompt)
        while len(self._prompts) > self._most or (self._size > self._most_bytes and len(self._prompts) > 1):
            self._remove(self._prompts.popitem(last=False)[1])

    def get(self, leg: str) -> Prompt | None:
        return self._prompts.get(leg)

    def nearest(self, prompt: Prompt) -> tuple[Like | None, Like | None]:
        """The most similar of other requests: under the same root (model, adapter, salt), and under another one."""
        same: dict[str, Prompt] = {}
        other: dict[str, Prompt] = {}
        for edge in reversed(_edges(prompt)):
            for found in reversed(self._edges.get(edge, ())):
                self._sort(found, prompt, same, other)
            if len(same) >= _COMPARED and len(other) >= _COMPARED:
                break
        if not same:
            for found in list(reversed(self._prompts.values()))[:_LATEST]:
                self._sort(found, prompt, same, other)
        return _best(prompt, same), _best(prompt, other)

    @staticmethod
    def _sort(found: Prompt, prompt: Prompt, same: dict[str, Prompt], other: dict[str, Prompt]) -> None:
        if found.request != prompt.request:
            kind = same if found.root == prompt.root else other
            if len(kind) < _LATEST:
                kind[found.leg] = found

    def _remove(self, prompt: Prompt | None) -> None:
        if prompt is None:
            return
        self._size -= prompt.size
        for edge in _edges(prompt):
            there = self._edges.get(edge)
            if there is not None and prompt in there:
                there.remove(prompt)
            if not there:
                self._edges.pop(edge, None)


def _edges(prompt: Prompt) -> list[bytes]:
    return [prompt.edges[at : at + EDGE_BYTES] for at in range(0, len(prompt.edges), EDGE_BYTES)]


def _best(prompt: Prompt, others: dict[str, Prompt]) -> Like | None:
    likes = [Like(other, marks.common(prompt.marks, other.marks)) for other in others.values()]
    best = max(likes, key=lambda like: (like.common, like.prompt.at), default=None)
    return best if best is not None and best.common else None

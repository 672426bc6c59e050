"""A plan as a simulation wants it: each request's prompt as a row of chunk numbers; equal numbers are equal prefixes. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from pdserve.bench.plan import Plan, Session, Step

WHOLE = 256


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: `chunks` number its whole chunks, parents before children; `tokens` is the prompt's length."""

    chunks: array[int]
    tokens: int
    output: int
    at: float | None
    think: float
    agents: tuple[tuple[float, bool, Talk], ...]
    group: str


@dataclass(frozen=True, slots=True)
class Talk:
    name: str
    turns: tuple[Turn, ...]
    start: float | None


@dataclass(frozen=True, slots=True)
class Work:
    """All of a plan's measured and filling stages, in order; `parents[i]` is the chunk before chunk i, -1 for a first one."""

    stages: tuple[tuple[bool, bool, int, tuple[Talk, ...]], ...]  # (measured, given, users, talks)
    parents: array[int]
    chunk_tokens: int

    @property
    def distinct_tokens(self) -> int:
        return len(self.parents) * self.chunk_tokens


class _Numbering:
    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self.parents = array("q")
        self._numbers: dict[tuple[int, tuple[tuple[str, int, int], ...]], int] = {}

    def talk(self, session: Session) -> Talk:
        return Talk(session.name, tuple(self.turn(session, step) for step in session.steps), session.start)

    def turn(self, session: Session, step: Step) -> Turn:
        chunks, tokens = self._chunks(step)
        agents = tuple((a.delay, a.joined, self.talk(a.session)) for a in step.agents)
        return Turn(chunks, tokens, step.output_tokens, step.at, step.think, agents, step.group)

    def _chunks(self, step: Step) -> tuple[array[int], int]:
        """Cuts the row of pieces at every chunk's end; what stands in a chunk, with its parent, is its name."""
        found, parent, total = array("q"), -1, 0
        inside: list[tuple[str, int, int]] = []
        room = self.chunk_tokens
        for piece in step.pieces:
            name, done = piece.name or piece.text, 0
            total += piece.tokens
            while piece.tokens - done >= room:
                inside.append((name, done, done + room))
                done += room
                parent = self._number(parent, tuple(inside))
                found.append(parent)
                inside, room = [], self.chunk_tokens
            if done < piece.tokens:
                inside.append((name, done, piece.tokens))
                room -= piece.tokens - done
        return found, total

    def _number(self, parent: int, inside: tuple[tuple[str, int, int], ...]) -> int:
        number = self._numbers.get((parent, inside))
        if number is None:
            number = self._numbers[parent, inside] = len(self.parents)
            self.parents.append(parent)
        return number


def of(plan: Plan, chunk_tokens: int = WHOLE, most_sessions: int = 0) -> Work:
    """`most_sessions` cuts endless stages; 0: they must end by themselves."""
    numbering = _Numbering(chunk_tokens)
    stages = []
    for stage in plan.stages:
        talks = tuple(numbering.talk(s) for s in _some(stage.sessions, most_sessions))
        stages.append((stage.measured, stage.given, stage.concurrency, talks))
    return Work(tuple(stages), numbering.parents, chunk_tokens)


def _some(sessions: Iterable[Session], most: int) -> Iterable[Session]:
    for number, session in enumerate(sessions):
        if most and number >= most:
            return
        yield session

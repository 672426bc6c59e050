"""What a workload is: stages of sessions of steps, all decided before anything is sent. No I/O and no clock in here.

A stage begins when the one before it has ended. A session is one user's conversation: its steps go out one after another.
A step's prompt is a row of pieces of synthetic text, or of what was answered before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class Piece:
    """`tokens` tokens of the text called `name`; or literal `text`; or, with `answer_of`, what that step of the session was answered.

    Where that step failed, the piece's own text stands in for its answer.
    """

    name: str
    tokens: int
    role: Role = "user"
    text: str = ""
    answer_of: int = -1


@dataclass(frozen=True, slots=True)
class Step:
    """One request. Its intended start is `at` seconds after the session's, or else `think` seconds after what it waits for:
    the answer before it and the sub-agents that this one started."""

    pieces: Sequence[Piece]
    output_tokens: int
    group: str = ""  # what summaries tell apart: first or repeat, decode or prefill, ...
    at: float | None = None
    think: float = 0.0
    agents: tuple[Agent, ...] = ()  # started once this step is answered; the next step waits for them

    @property
    def prompt_tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Session:
    """`start`: seconds after the stage's begin at which it comes in, where the workload itself says so."""

    name: str
    steps: tuple[Step, ...]
    start: float | None = None


@dataclass(frozen=True, slots=True)
class Agent:
    """A conversation that another one starts, `delay` seconds after its own answer, and waits for if `joined`."""

    delay: float
    session: Session
    joined: bool = True


@dataclass(frozen=True, slots=True)
class Stage:
    """`measured` is False for what only fills caches. `given`: sessions come in at their own `start`; otherwise the load options
    say when. `concurrency` is the number of users where neither does."""

    name: str
    sessions: Iterable[Session]
    measured: bool = True
    given: bool = False
    concurrency: int = 1
    endless: bool = False  # sessions never run out: only a duration ends it


@dataclass(frozen=True, slots=True)
class Plan:
    workload: str
    seed: int
    stages: tuple[Stage, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False  # what this workload's known tool speaks; --endpoint overrides it

    def longest(self) -> int:
        """Tokens of the longest prompt and answer together, of the sessions that are listed."""
        steps = (step for stage in self.stages if not stage.endless for s in stage.sessions for step in every_step(s))
        return max((step.prompt_tokens + step.output_tokens for step in steps), default=0)


def every_step(session: Session) -> Iterable[Step]:
    """The session's steps and those of its sub-agents."""
    for step in session.steps:
        yield step
        for agent in step.agents:
            yield from every_step(agent.session)


def single(
    name: str, pieces: Iterable[Piece], output_tokens: int, group: str = "", start: float | None = None
) -> Session:
    """A session of one request."""
    return Session(name, (Step(tuple(pieces), output_tokens, group),), start)

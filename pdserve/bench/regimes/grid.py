"""The points of a sweep over working set, prompt length, reused share and users, and what is sent at each. Pure."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.bench.plan import Piece, Plan, Stage, single


@dataclass(frozen=True, slots=True)
class Point:
    """`working_set` and `length` in tokens, `reuse` in percent of the prompt that was sent before."""

    working_set: int
    length: int
    reuse: int
    users: int

    @property
    def name(self) -> str:
        return f"set {self.working_set}, length {self.length}, reuse {self.reuse} %, users {self.users}"


def points(sets: Sequence[int], lengths: Sequence[int], reuses: Sequence[int], users: Sequence[int]) -> list[Point]:
    """Every combination that makes sense: a working set holds one prompt at least, and nothing more where nothing is reused."""
    found = [Point(max(s, n) if r else n, n, r, u) for s, n, r, u in itertools.product(sets, lengths, reuses, users)]
    return list(dict.fromkeys(found))


def plan(point: Point, requests: int, output: int, seed: int) -> Plan:
    """First every document once, then prompts that begin as one of them does."""
    rng = random.Random(f"{seed}/{point.name}")
    names = [f"{point.name}/{n}" for n in range(max(1, point.working_set // point.length))]
    known = point.length * point.reuse // 100
    fill = [single(f"fill {name}", (Piece(name, point.length),), 1, "fill") for name in names] if known else []
    asked = []
    for n in range(requests):
        pieces = (Piece(rng.choice(names), known), Piece(f"{point.name}/new-{n}", point.length - known + 1))
        asked.append(single(f"request {n}", [p for p in pieces if p.tokens], output, point.name))
    stages = (
        Stage(f"fill: {point.name}", fill, measured=False, concurrency=min(point.users, 2)),
        Stage(point.name, asked, concurrency=point.users),
    )
    return Plan("regimes", seed, stages)

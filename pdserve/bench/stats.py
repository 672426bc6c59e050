"""Whether two arms differ, and how surely: bootstrap intervals of ratios. Pure, seeded.

Requests are resampled, in pairs where both arms were sent the same ones, after their repetitions. The bootstrap of a few
repetitions is too sure of itself, and what drifts on a machine between two turns is in the repetitions, not in the requests:
hence the interval is widened to Student's, of the logarithms of the ratios of repetitions that ran next to each other.
Rates (tokens per second) exist once a repetition and have that one alone. Counts (requests within the target) have both: a few
turns may happen to count alike. One repetition has no interval at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
HALF = 0.5  # is added to all counts where one is zero, so that their ratio is finite
CONFIDENCE = 0.95
# Student's t, 97.5 %, by degrees of freedom; from 30 on the normal distribution's is close enough
_T = (0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T_MANY = 2.04

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]
Statistic = Callable[[Floats, Floats], float]  # of values in order and their weights


@dataclass(frozen=True, slots=True)
class Ratio:
    """b / a with its interval. `low` and `high` are None where there was too little to say anything."""

    a: float
    b: float
    value: float
    low: float | None
    high: float | None

    @property
    def differs(self) -> bool | None:
        """True: the interval leaves out 1. None: there is no interval."""
        if self.low is None or self.high is None:
            return None
        return self.low > 1 or self.high < 1


@dataclass(frozen=True, slots=True)
class Sample:
    """One repetition of one arm: for each request its values (one time, or all its gaps), and the request's name."""

    keys: tuple[object, ...]
    values: tuple[Sequence[float], ...]


def mean(values: Floats, weights: Floats) -> float:
    return float(np.average(values, weights=weights))


def quantile(q: float) -> Statistic:
    """The nearest rank of the weighted sample."""

    def found(values: Floats, weights: Floats) -> float:
        heaped = np.cumsum(weights)
        return float(values[min(len(values) - 1, int(np.searchsorted(heaped, q * heaped[-1], side="right")))])

    return found


class _Arm:
    """All values of all repetitions in one order, with the request that each belongs to."""

    def __init__(self, repetitions: Sequence[Sample]) -> None:
        values = [(v, number) for number, v in enumerate(v for s in repetitions for v in s.values)]
        flat = np.array([x for v, _ in values for x in v], dtype=float)
        owner = np.array([n for v, n in values for _ in v], dtype=int)
        order = np.argsort(flat, kind="stable")
        self.values, self.owner = flat[order], owner[order]
        self.requests = len(values)

    def of(self, counts: Floats, statistic: Statistic) -> float | None:
        weights = counts[self.owner]
        return statistic(self.values, weights) if len(self.values) and weights.sum() > 0 else None


def ratio(a: Sequence[Sample], b: Sequence[Sample], statistic: Statistic, seed: int = 0) -> Ratio | None:
    """statistic(b) / statistic(a); None if one of them has no values."""
    common = min(len(a), len(b))
    left, right, paired = _aligned(list(a[:common]), list(b[:common]))
    arm_a, arm_b = _Arm(left), _Arm(right)
    if not len(arm_a.values) or not len(arm_b.values):
        return None
    base_a = arm_a.of(np.ones(arm_a.requests), statistic)
    base_b = arm_b.of(np.ones(arm_b.requests), statistic)
    if not base_a or base_b is None:
        return None
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        repetitions = rng.integers(0, common, common)
        drawn_a = _draw(left, repetitions, rng)
        drawn_b = drawn_a if paired else _draw(right, repetitions, rng)
        top, bottom = arm_b.of(drawn_b, statistic), arm_a.of(drawn_a, statistic)
        if top is not None and bottom:
            found.append(top / bottom)
    by_turn = _turns(left, right, statistic)
    if by_turn is None or min(arm_a.requests, arm_b.requests) < 3 or len(found) < RESAMPLES // 2:
        return Ratio(base_a, base_b, base_b / base_a, None, None)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Ratio(base_a, base_b, base_b / base_a, min(float(low), by_turn[0]), max(float(high), by_turn[1]))


def _turns(left: Sequence[Sample], right: Sequence[Sample], statistic: Statistic) -> tuple[float, float] | None:
    """Student's interval of the ratio, from one ratio per repetition."""
    logs = []
    for one, other in zip(left, right, strict=True):
        a, b = _Arm([one]), _Arm([other])
        bottom, top = a.of(np.ones(a.requests), statistic), b.of(np.ones(b.requests), statistic)
        if bottom and top:
            logs.append(math.log(top / bottom))
    return _student(logs)


def _student(logs: Sequence[float]) -> tuple[float, float] | None:
    if len(logs) < 2:
        return None
    middle = sum(logs) / len(logs)
    spread = math.sqrt(sum((x - middle) ** 2 for x in logs) / (len(logs) - 1))
    t = _T[len(logs) - 1] if len(logs) - 1 < len(_T) else _T_MANY
    reach = t * spread / math.sqrt(len(logs))
    return math.exp(middle - reach), math.exp(middle + reach)


def _aligned(a: list[Sample], b: list[Sample]) -> tuple[list[Sample], list[Sample], bool]:
    """Both with the same requests in the same order, if nearly all are common; as they are and False otherwise."""
    left, right = [], []
    for one, other in zip(a, b, strict=True):
        there = {key: values for key, values in zip(other.keys, other.values, strict=True)}
        keys = [key for key in one.keys if key in there]
        if len(keys) < 0.9 * max(len(one.keys), len(other.keys)) or len(set(one.keys)) != len(one.keys):
            return a, b, False
        here = dict(zip(one.keys, one.values, strict=True))
        left.append(Sample(tuple(keys), tuple(here[k] for k in keys)))
        right.append(Sample(tuple(keys), tuple(there[k] for k in keys)))
    return left, right, True


def _draw(samples: Sequence[Sample], repetitions: Sequence[int] | np.ndarray, rng: np.random.Generator) -> Floats:
    """How often each request of all repetitions was drawn."""
    starts = np.cumsum([0, *(len(s.keys) for s in samples)])
    counts = np.zeros(int(starts[-1]))
    for r in repetitions:
        size = len(samples[r].keys)
        if size:
            counts[starts[r] : starts[r + 1]] += np.bincount(rng.integers(0, size, size), minlength=size)
    return counts


def rate_ratio(a: Sequence[float], b: Sequence[float]) -> Ratio | None:
    """Of one rate per repetition; the n-th of each ran next to each other."""
    given = list(zip(a, b, strict=False))
    if not given or not any(x or y for x, y in given):
        return None
    pairs = given if all(x > 0 and y > 0 for x, y in given) else [(x + HALF, y + HALF) for x, y in given]
    logs = [math.log(y / x) for x, y in pairs]
    middle = sum(logs) / len(logs)
    base_a, base_b = sum(x for x, _ in pairs) / len(pairs), sum(y for _, y in pairs) / len(pairs)
    low, high = _student(logs) or (None, None)
    return Ratio(base_a, base_b, math.exp(middle), low, high)


def count_ratio(a: Sequence[Set[object]], b: Sequence[Set[object]], seed: int = 0) -> Ratio | None:
    """Of how many requests there were once a repetition, given by their names. Resampled are the requests that either arm has: where
    only a few are one arm's alone, the counts are nearly the same ones and their ratio is sure."""
    turns = list(zip(a, b, strict=False))
    found = rate_ratio([float(len(x)) for x, _ in turns], [float(len(y)) for _, y in turns])
    if found is None or found.low is None or found.high is None:
        return found
    named = [sorted(x | y, key=repr) for x, y in turns]  # a set's own order is another one in each process
    there = [
        np.array([(name in x, name in y) for name in names], dtype=float).reshape(-1, 2)
        for names, (x, y) in zip(named, turns, strict=True)
    ]
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(RESAMPLES):
        turns_drawn = (there[n] for n in rng.integers(0, len(there), len(there)))
        drawn = [rows[rng.integers(0, max(1, len(rows)), len(rows))] for rows in turns_drawn]
        bottom, top = np.concatenate(drawn).sum(axis=0)
        ratios.append(top / bottom if bottom and top else (top + HALF) / (bottom + HALF))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Ratio(found.a, found.b, found.value, min(found.low, float(low)), max(found.high, float(high)))

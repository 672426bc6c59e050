"""From two looks at counters to what a person wants to read: rates and percentiles. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

WINDOW = 30.0  # seconds that a percentile is made of: enough requests to mean something, few enough to move


def rate(now: float | None, before: float | None, seconds: float) -> float | None:
    """Per second. None where one of the two is not known; a counter that fell has begun anew."""
    if now is None or before is None or seconds <= 0:
        return None
    return (now - before if now >= before else now) / seconds


def rates(now: Mapping[str, float], before: Mapping[str, float] | None, seconds: float) -> dict[str, float]:
    """For every key. One that is new began with 0 if the others were known before."""
    if before is None or seconds <= 0:
        return {}
    return {key: rate(value, before.get(key, 0.0), seconds) or 0.0 for key, value in now.items()}


def quantile(q: float, buckets: Mapping[str, float]) -> float | None:
    """Of a cumulative histogram {upper bound: count}, linear within the bucket, as Prometheus does it."""
    bounds = sorted((math.inf if bound == "+Inf" else float(bound), count) for bound, count in buckets.items())
    if not bounds or (total := bounds[-1][1]) <= 0:
        return None
    rank, low, below = q * total, 0.0, 0.0
    for bound, count in bounds:
        if count >= rank:
            if math.isinf(bound):
                return low
            return low + (bound - low) * ((rank - below) / (count - below) if count > below else 1.0)
        low, below = bound, count
    return low


class Recent:
    """A cumulative histogram over the last seconds."""

    def __init__(self, window: float = WINDOW) -> None:
        self._window = window
        self._seen: deque[tuple[float, dict[str, float]]] = deque(maxlen=256)

    def add(self, now: float, buckets: dict[str, float]) -> None:
        if self._seen and sum(buckets.values()) < sum(self._seen[-1][1].values()):
            self._seen.clear()  # it began anew
        self._seen.append((now, buckets))
        while len(self._seen) > 2 and self._seen[1][0] <= now - self._window:
            self._seen.popleft()

    def quantile(self, q: float) -> float | None:
        """None while nothing was observed."""
        if len(self._seen) < 2:
            return None
        first, last = self._seen[0][1], self._seen[-1][1]
        return quantile(q, {bound: count - first.get(bound, 0.0) for bound, count in last.items()})

"""Straight lines through a few points. Prefill is slightly more than linear in the prompt; over these lengths a line does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Line(NamedTuple):
    """seconds = base + slope * tokens; neither is below 0."""

    base: float
    slope: float


def line(points: Sequence[tuple[int, float]]) -> Line:
    """Least squares."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    slope = max(slope, 0.0)
    return Line(max(mean_y - slope * mean_x, 0.0), slope)


def crossing(computed: Line, loaded: Line) -> float | None:
    """From how many tokens on `loaded` stays below `computed`; 0.0: always; None: not for long prompts, whatever short ones do."""
    if loaded.slope < computed.slope:
        return max(0.0, (loaded.base - computed.base) / (computed.slope - loaded.slope))
    return 0.0 if loaded.slope == computed.slope and loaded.base < computed.base else None

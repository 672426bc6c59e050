"""How many users a server can take: a ramp that adds users while the time to the first token keeps to its target. Pure.

As production load balancers do it: every period the worst requests of that period are looked at; with room left users are
added in proportion to the room, without room they are taken away. What the server took is the most users at which a whole
period kept the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

QUANTILE = 0.95
LEAST_SAMPLES = 3  # answers in a period before it says anything


@dataclass(frozen=True, slots=True)
class Period:
    """One look: users during it, its TTFT quantile in seconds (None: too few answers), requests in it and those within the target."""

    begin: float
    users: int
    ttft: float | None
    requests: int
    within: int

    def kept(self, target: float) -> bool:
        return self.ttft is not None and self.ttft <= target


@dataclass(slots=True)
class Ramp:
    start: int
    most: int
    target: float  # seconds to the first token
    period: float = 30.0
    periods: list[Period] = field(default_factory=list)

    def next_users(self, begin: float, users: int, ttfts: Sequence[float]) -> int:
        """Users for the next period, from the first-token times of this one; a request that failed counts as its timeout."""
        ordered = sorted(ttfts)
        worst = ordered[min(len(ordered) - 1, int(QUANTILE * len(ordered)))] if len(ordered) >= LEAST_SAMPLES else None
        within = sum(t <= self.target for t in ordered)
        self.periods.append(Period(begin, users, worst, len(ordered), within))
        if worst is None:
            return users
        if worst > self.target:
            return max(1, self.start, users - max(1, users // 4))
        room = 1 - worst / self.target
        return min(self.most, users + max(1, int(users * room / 2)))

    @property
    def carried(self) -> int:
        """The most users at which a period kept the target; 0 if none did."""
        return max((p.users for p in self.periods if p.kept(self.target)), default=0)

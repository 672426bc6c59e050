"""Whether to load a prefix or to compute it: what both have cost of late, and what they would cost now. Pure.

Both times are lines over the number of tokens, fitted by least squares with older observations fading
(sums decayed by `FADE` at each new one). Nothing is assumed before it has been seen: until both sides are measured,
a hit is loaded. What has been slower is tried again now and then, since nothing else would show that it is not any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal

FADE: Final = 0.95
#: observations of one side before it is believed
ENOUGH: Final = 3
#: of so many hits that would be computed, one is loaded all the same
PROBE_EVERY: Final = 16

Reason = Literal[
    "faster", "unmeasured", "probe", "always", "slower", "short", "handover", "failed", "never", "unavailable"
]  # fmt: skip


class Line:
    """seconds = base + slope * tokens, both at least 0."""

    def __init__(self) -> None:
        self.seen = 0
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        self.seen += 1
        self._n = self._n * FADE + 1
        self._x = self._x * FADE + tokens
        self._y = self._y * FADE + seconds
        self._xx = self._xx * FADE + tokens * tokens
        self._xy = self._xy * FADE + tokens * seconds

    def fit(self) -> tuple[float, float]:
        """(base, slope). With one length seen only, all of the time is laid to the tokens."""
        if not self._x:
            return 0.0, 0.0
        spread = self._n * self._xx - self._x * self._x
        if spread > 1e-9 * self._n * self._xx:
            slope = (self._n * self._xy - self._x * self._y) / spread
            base = (self._y - slope * self._x) / self._n
            if slope >= 0 and base >= 0:
                return base, slope
            if slope < 0:
                return self._y / self._n, 0.0
        return 0.0, self._xy / self._xx

    def at(self, tokens: float) -> float | None:
        """Seconds for so many tokens; None while too little has been seen."""
        if self.seen < ENOUGH:
            return None
        base, slope = self.fit()
        return base + slope * tokens


@dataclass(frozen=True)
class Choice:
    load: bool
    reason: Reason
    #: predicted seconds, None where unknown
    load_s: float | None = None
    compute_s: float | None = None
    #: what else there is to say of the reason
    detail: str = ""


@dataclass
class BreakEven:
    """One per engine. `loading`: arena to blocks; `fetching`: from a lower tier into the arena, while a request waits."""

    computing: Line = field(default_factory=Line)
    loading: Line = field(default_factory=Line)
    fetching: Line = field(default_factory=Line)
    _skipped: int = 0

    def choose(self, tokens: int, to_fetch: int = 0) -> Choice:
        """For a hit of `tokens`, `to_fetch` of them in a lower tier still."""
        compute, load = self.computing.at(tokens), self.loading.at(tokens)
        if load is not None and to_fetch:
            fetch = self.fetching.at(to_fetch)
            load = None if fetch is None else load + fetch
        if compute is None or load is None:
            return Choice(True, "unmeasured", load, compute)
        if load <= compute:
            return Choice(True, "faster", load, compute)
        self._skipped += 1
        if self._skipped % PROBE_EVERY == 0:
            return Choice(True, "probe", load, compute)
        return Choice(False, "slower", load, compute)

    def patience(self, tokens: int) -> float | None:
        """How long it makes sense to wait for `tokens`: as long as computing them takes. Whoever stops then has spent at
        most twice the better choice's time. None: unknown."""
        return self.computing.at(tokens)

    def prefill_speed(self) -> float:
        """Tokens computed a second; 0 while it is not known."""
        if self.computing.seen < ENOUGH:
            return 0.0
        slope = self.computing.fit()[1]
        return 1 / slope if slope else 0.0

    def saved(self, tokens: int, seconds: float) -> float | None:
        """What a load of `tokens` that took `seconds` has spared; negative if it was the slower way."""
        compute = self.computing.at(tokens)
        return None if compute is None else compute - seconds

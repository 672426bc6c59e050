"""What a prefill takes, as a straight line over the size of its prompt, fitted to what was measured lately. Pure."""

from __future__ import annotations

FORGET = 0.05  # how much each new measurement counts


class Pace:
    def __init__(self) -> None:
        self._x = self._y = self._xx = self._xy = 0.0
        self.count = 0

    def add(self, size: float, seconds: float) -> None:
        self.count += 1
        share = max(FORGET, 1 / self.count)
        self._x += share * (size - self._x)
        self._y += share * (seconds - self._y)
        self._xx += share * (size * size - self._xx)
        self._xy += share * (size * seconds - self._xy)

    @property
    def mean(self) -> float:
        """Seconds, 0 before anything was measured."""
        return self._y

    def seconds(self, size: float) -> float:
        """For one of this size; as long as sizes hardly differ, for any."""
        spread = self._xx - self._x * self._x
        if spread <= 1e-6 * max(1.0, self._xx):
            return self._y
        slope = max(0.0, (self._xy - self._x * self._y) / spread)
        return max(0.0, self._y - slope * self._x) + slope * size

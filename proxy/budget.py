"""How many second tries there may be, so that a fleet in trouble is not asked twice for everything.

Every request earns a fifth of a second try; one is spent when an engine that is alive did not do its work (an error
status, no answer in time) and another is asked instead. A try after a refused or broken connection is free: that engine
does no work any more, so sending its requests elsewhere adds nothing to what the fleet was asked. Both are bounded for
each single request too (legs.ATTEMPTS, takeover.LIVES).
"""

from __future__ import annotations

EARNED = 0.2
MOST = 50.0
START = 10.0
_FREE = ("connect", "broken")


class Budget:
    def __init__(self) -> None:
        self.left = START

    def earn(self) -> None:
        self.left = min(MOST, self.left + EARNED)

    def spend(self, reason: str) -> bool:
        """False: the failure has to stand."""
        if reason in _FREE:
            return True
        if self.left < 1:
            return False
        self.left -= 1
        return True

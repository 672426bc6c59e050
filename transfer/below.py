"""What lies below DRAM, as bringing up, writing down, asking and deleting share it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pdserve import log
from pdserve.transfer.lower import Lower
from pdserve.transfer.store import Store

_LOG_EVERY_S = 10.0
_log = log.get("tiers")


@dataclass
class Below:
    """`lowers` are asked in their order; `post` runs a function on the loop, from any thread."""

    store: Store
    lowers: list[Lower]
    metrics: dict[str, Any]
    post: Callable[[Callable[[], None]], object]
    _told: dict[tuple[str, str], float] = field(default_factory=dict)

    def failed(self, tier: str, op: str, reason: str, why: str) -> None:
        """Counts it, and says so now and then; what is damaged always."""
        self.metrics["cache_tier_failures_total"].labels(tier, op, reason).inc()
        if reason == "corrupt":
            self.metrics["cache_digest_failures_total"].labels(tier).inc()
            _log.error("digest mismatch in %s, dropped: %s", tier, why)
            return
        now = time.monotonic()
        if reason != "gone" and why and self._told.get((tier, op), 0.0) < now:
            self._told[tier, op] = now + _LOG_EVERY_S
            _log.warning("%s of tier %s did not succeed (%s): %s", op, tier, reason, why)

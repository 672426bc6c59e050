"""Spans of what the cache does for a request: exported by the daemon, within the trace that the engine's request is part of.

An engine tells of its loads, stores and waits in passing (telling.py) and so needs no tracing of its own; the daemon adds
its lookups and what it brought up from lower tiers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from pdserve.trace import Tracing
from pdserve.transfer import telling

MOST_LOOKUPS = 4096
_NAMES = {"queue": "engine queue", "load": "kv load", "transfer": "kv transfer", "store": "kv store"}


class Spans:
    """`arrivals(leg)` gives the reads of lower tiers that were made for it."""

    def __init__(self, tracing: Tracing, arrivals: Callable[[telling.Leg], list[dict[str, Any]]]) -> None:
        self._tracing, self._arrivals = tracing, arrivals
        self._lookups: OrderedDict[bytes, tuple[float, float, int, int]] = OrderedDict()

    def looked_up(self, keys: list[bytes], found: int, at: float, seconds: float) -> None:
        """A lookup was answered; whose it was shows when the engine tells of its leg."""
        if keys:
            self._lookups[keys[-1]] = (at, seconds, len(keys), found)
            while len(self._lookups) > MOST_LOOKUPS:
                self._lookups.popitem(last=False)

    def told(self, instance: str, leg: telling.Leg, spans: list[telling.Span], new: bool) -> None:
        """`new`: the leg has been told of just now, with what was told before it."""
        if not leg.traceparent:
            return
        base = {"pdserve.instance": instance, "pdserve.request_id": leg.leg}
        if new:
            self._of_the_daemon(leg, base)
        for span in spans:
            told = {**base, "pdserve.bytes": span.bytes, "pdserve.tokens": span.tokens, "pdserve.tier": span.tier,
                    "pdserve.detail": span.detail}  # fmt: skip
            self._tracing.told(leg.traceparent, _NAMES.get(span.name, span.name), span.at, span.ms, told)

    def _of_the_daemon(self, leg: telling.Leg, base: dict[str, Any]) -> None:
        looked = self._lookups.pop(leg.keys[-1], None) if leg.keys else None
        if looked is not None:
            at, seconds, keys, found = looked
            told = {**base, "pdserve.chunks": keys, "pdserve.found": found}
            self._tracing.told(leg.traceparent, "cache lookup", at, seconds * 1000, told)
        for span in self._arrivals(leg):
            told = {**base, "pdserve.tier": span["tier"], "pdserve.bytes": span["bytes"], "pdserve.detail": span["detail"]}
            self._tracing.told(leg.traceparent, "tier read", span["at"], span["ms"], told)

    def stop(self) -> None:
        self._tracing.stop()

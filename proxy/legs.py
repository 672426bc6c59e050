"""What the legs of all requests share: the engines to choose from, how they are spoken to, and how long each may take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from pdserve.engines.base import Dialect
from pdserve.proxy.began import Began
from pdserve.proxy.budget import Budget
from pdserve.proxy.exchange import Exchange
from pdserve.proxy.fleet import Fleet
from pdserve.proxy.instance import Instance
from pdserve.proxy.lifetime import Deadlines
from pdserve.proxy.routing import Routing
from pdserve.proxy.upstream import Answer

ATTEMPTS = 2  # instances tried per leg: one failure is seen through, a failing fleet is not hammered
REPLY_LIMIT = 16 * 1024 * 1024
NOBODY = "No engine that can answer is up."


class Legs:
    def __init__(
        self, fleet: Fleet, dialect: Dialect, routing: Routing, deadlines: Deadlines, began: Began | None = None
    ) -> None:
        self.fleet, self.dialect, self.routing, self.deadlines = fleet, dialect, routing, deadlines
        self.budget = Budget()
        self.began = Began((), "") if began is None else began
        self._known: dict[tuple[str, str], Any] = {}

    def producer(self, exchange: Exchange, tried: Sequence[Instance]) -> Instance | None:
        """The policy's pick among those that were not tried; None if there is none left."""
        return self.fleet.choose(self.routing.prefill, exchange.facts, self.fleet.producers(), tried)

    def consumer(self, exchange: Exchange, tried: Sequence[Instance] = ()) -> Instance | None:
        return self.fleet.choose(self.routing.decode, exchange.facts, self.fleet.consumers(), tried)

    def open(
        self, instance: Instance, exchange: Exchange, body: bytes, until: float, path: bytes | None = None
    ) -> AbstractAsyncContextManager[Answer]:
        """Upstream.request, to the client's own path unless another is given."""
        sent, traced = exchange.headers, exchange.trail.traced
        if traced is not None:
            sent = traced.headers(sent, instance.name)
        ask = (exchange.method, path or exchange.path, sent, body)
        return instance.upstream.request(*ask, self.deadlines.connect, until)

    def measure(self, exchange: Exchange) -> None:
        """The first token of a decision that nothing has thwarted."""
        if exchange.uncached is not None and not exchange.trail.recoveries:
            local = exchange.route == "local"
            took = time.perf_counter() - exchange.decided
            self.routing.worth.took(local, exchange.uncached[local], took)

    def labelled(self, metric: str, label: str) -> Any:
        """Looked up in the library once, which takes a lock and its time."""
        found = self._known.get((metric, label))
        if found is None:
            found = self._known[metric, label] = self.fleet.metrics[metric].labels(label)
        return found

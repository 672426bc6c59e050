"""What a metric is: name, type, unit, labels, meaning and what to do when it moves. Prometheus format, prefix `pdserve_`.

Labels stay bounded: instance names, tiers, routes and reasons come from closed sets, never from a request.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

PREFIX = "pdserve_"


class Metric(NamedTuple):
    """`unit` and `act` (what to do when it moves) are for people: docs/metrics.md shows them, a test wants them."""

    kind: type[Counter] | type[Gauge] | type[Histogram]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    unit: str = ""
    act: str = ""


def build(table: dict[str, Metric], registry: CollectorRegistry) -> dict[str, Any]:
    """Makes the table's metrics in `registry` and returns them by short name."""
    made: dict[str, Any] = {}
    for name, m in table.items():
        if m.kind is Histogram:
            made[name] = Histogram(PREFIX + name, m.help, m.labels, registry=registry, buckets=m.buckets)
        elif m.kind is Gauge:  # the mode counts only where several worker processes are shown as one
            mode: Literal["livemax", "livemin", "livesum"] = "livemax" if name.endswith("_up") else "livesum"
            mode = "livemin" if name.endswith("_timestamp_seconds") else mode
            made[name] = Gauge(PREFIX + name, m.help, m.labels, registry=registry, multiprocess_mode=mode)
        else:
            made[name] = m.kind(PREFIX + name, m.help, m.labels, registry=registry)
    return made

"""The proxy's series about engines: they go with the engine, so that /metrics does not grow with every one that ever was."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest, multiprocess

from pdserve.metrics.proxy import PROXY

_LABEL = "instance"


def forget(made: dict[str, Any], instance: str) -> None:
    """Drops what was counted of this engine. What several workers count in their files stays there, and is not shown."""
    if _several():
        return
    for name, about in PROXY.items():
        if _LABEL not in about.labels:
            continue
        samples = [sample for family in made[name].collect() for sample in family.samples]
        gone = {tuple(s.labels[label] for label in about.labels) for s in samples if s.labels.get(_LABEL) == instance}
        for values in gone:
            made[name].remove(*values)


def page(registry: CollectorRegistry, instances: Collection[str]) -> bytes:
    """/metrics: of `instances` and of what is about none; as one of several workers, what all of them have counted."""
    if _several():
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
    return generate_latest(_Only(registry, instances))


def _several() -> bool:
    return bool(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))


class _Only:
    """A request that outlives its engine may count once more; it is not shown."""

    def __init__(self, registry: CollectorRegistry, instances: Collection[str]) -> None:
        self._registry, self._instances = registry, frozenset(instances)

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [s for s in family.samples if s.labels.get(_LABEL, "") in self._instances or _LABEL not in s.labels]
            yield family

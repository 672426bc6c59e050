from __future__ import annotations

from prometheus_client import CollectorRegistry

from pdserve.metrics.cache import CACHE
from pdserve.metrics.metric import build
from pdserve.transfer.flows import MOST_ENGINES, OTHERS, Flows


def test_bytes_are_the_engines_own_and_names_are_bounded() -> None:
    registry = CollectorRegistry()
    flows = Flows(build(CACHE, registry)["cache_engine_bytes_total"])

    def told(engine: str, direction: str, tier: str) -> float | None:
        return registry.get_sample_value(
            "pdserve_cache_engine_bytes_total", {"engine": engine, "direction": direction, "tier": tier}
        )

    for _ in range(2):
        flows.stored("prefill-0", 5)
        flows.loaded("prefill-0", "disk", 7)
    assert (told("prefill-0", "stored", "dram"), told("prefill-0", "loaded", "disk")) == (10, 14)
    for n in range(2 * MOST_ENGINES):
        flows.stored(f"engine-{n}", 1)
    flows.loaded("prefill-0", "dram", 3)  # who was known before still is
    assert told("prefill-0", "loaded", "dram") == 3
    assert told(OTHERS, "stored", "dram") == MOST_ENGINES + 1

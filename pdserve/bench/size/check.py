"""The simulation beside a real run of the same plan: what it said, what was measured, how far off it was. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.bench.results import Result
from pdserve.bench.size.simulate import Simulated
from pdserve.bench.summary import quantile, summarise


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: simulated, measured, and the first over the second."""

    name: str
    simulated: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.simulated / self.measured if self.measured else float("inf")


def compare(found: Simulated, result: Result, arm: str) -> list[Row]:
    """Figures of the arm's measured requests, all repetitions together."""
    records = result.of(arm)
    summary = summarise(records, result.timeout, result.slo)
    if summary is None or not found.requests:
        return []
    repetitions = len({r.repetition for r in records})
    firsts = [r.ttft_ms / 1000 for r in records if r.phase == "measured" and r.ok and r.ttft_ms is not None]
    rows = [
        Row("requests", found.requests, summary.requests / repetitions),
        Row(
            "prompt tokens", found.prompt, sum(r.prompt_tokens for r in records if r.phase == "measured") / repetitions
        ),
        Row("hit rate", found.hit_rate, summary.cached or 0.0),
        Row("TTFT mean, s", sum(found.ttfts) / len(found.ttfts), summary.ttft_mean / 1000),
        Row("TTFT p50, s", found.ttft(0.5), summary.ttft_p50 / 1000),
    ]
    if firsts:
        rows.append(Row("TTFT p90, s", found.ttft(0.9), quantile(firsts, 0.9)))
    rows.append(Row("duration, s", found.seconds, summary.seconds / repetitions))
    return rows

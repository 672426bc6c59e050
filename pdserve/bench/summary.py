"""Figures of a run's records. Pure.

A request that failed or ran into its timeout stays in every percentile, as the timeout at least: a server that refuses the
slow ones must not look fast. What was begun during warm-up, and what only filled caches, is left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pdserve.bench.record import Record

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Summary:
    """Milliseconds and tokens per second. `cached` is the part of all prompt tokens that the server says it did not compute."""

    requests: int
    failed: int
    seconds: float
    ttft_mean: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    itl_p50: float | None
    itl_p99: float | None
    itl_max: float | None
    latency_p50: float
    latency_p99: float
    output_rate: float
    input_rate: float
    request_rate: float
    within_slo: int | None  # requests whose first token came in time
    cached: float | None
    load_ms: float | None = None
    saved_ms: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measured(records: Iterable[Record]) -> list[Record]:
    return [r for r in records if r.phase == "measured"]


def ttft(record: Record, timeout: float) -> float:
    """Milliseconds; of one that failed, the timeout or as long as it took to fail, whichever is more."""
    return record.ttft_ms if record.ok and record.ttft_ms is not None else _failed(record, timeout)


def latency(record: Record, timeout: float) -> float:
    return record.latency_ms if record.ok and record.latency_ms is not None else _failed(record, timeout)


def _failed(record: Record, timeout: float) -> float:
    return max(timeout, record.ended - record.intended) * 1000


def quantile(values: Iterable[float], q: float) -> float:
    """The nearest rank: with few values p99 is the largest."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def summarise(records: Sequence[Record], timeout: float, slo: float | None = None) -> Summary | None:
    """Of the measured records, None if there are none. `slo` in seconds to the first token."""
    rows = measured(records)
    if not rows:
        return None
    firsts, lasts = [ttft(r, timeout) for r in rows], [latency(r, timeout) for r in rows]
    gaps = [gap for r in rows for gap in r.itl_ms]
    seconds = sum(end - begin for begin, end in spans(rows)) or 1e-9
    prompt = sum(r.prompt_tokens for r in rows)
    known = [r for r in rows if r.cached_tokens is not None]
    return Summary(
        requests=len(rows),
        failed=sum(not r.ok for r in rows),
        seconds=seconds,
        ttft_mean=sum(firsts) / len(firsts),
        ttft_p50=quantile(firsts, 0.5),
        ttft_p90=quantile(firsts, 0.9),
        ttft_p99=quantile(firsts, 0.99),
        itl_p50=quantile(gaps, 0.5) if gaps else None,
        itl_p99=quantile(gaps, 0.99) if gaps else None,
        itl_max=max(gaps) if gaps else None,
        latency_p50=quantile(lasts, 0.5),
        latency_p99=quantile(lasts, 0.99),
        output_rate=sum(r.output_tokens for r in rows) / seconds,
        input_rate=prompt / seconds,
        request_rate=len(rows) / seconds,
        within_slo=None if slo is None else sum(t <= slo * 1000 for t in firsts),
        cached=sum(r.cached_tokens or 0 for r in known) / (sum(r.prompt_tokens for r in known) or 1) if known else None,
        load_ms=_sum(r.load_ms for r in rows),
        saved_ms=_sum(r.saved_ms for r in rows),
    )


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def spans(rows: Iterable[Record]) -> list[tuple[float, float]]:
    """From the first intended start to the last end, of every repetition and stage by itself."""
    found: dict[tuple[str, int, str], tuple[float, float]] = {}
    for r in rows:
        key = (r.arm, r.repetition, r.stage)
        begin, end = found.get(key, (r.intended, r.ended))
        found[key] = (min(begin, r.intended), max(end, r.ended))
    return list(found.values())


def groups(records: Iterable[Record]) -> list[str]:
    """The groups that were measured, in order of appearance."""
    return list(dict.fromkeys(r.group for r in records if r.phase == "measured"))


def phases(records: Iterable[Record]) -> dict[str, int]:
    """How many requests were left out and why, beside the measured ones."""
    counts: dict[str, int] = {}
    for r in records:
        counts[r.phase] = counts.get(r.phase, 0) + 1
    return counts

"""One request as it went: the row of the raw files. What is not known is None, never a guess."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Times are seconds since the run's begin (`intended`, `sent`, `first`, `ended`) or milliseconds (names end in _ms).

    Latency counts from the intended start: what a request waited because the one before it was late, or because the client
    was busy, is part of what its user saw.
    """

    arm: str = ""
    repetition: int = 0
    stage: str
    group: str = ""
    session: str
    step: int
    phase: str = "measured"  # or warmup, fill
    status: str = "ok"  # or error, timeout
    error: str = ""
    intended: float
    sent: float = 0.0
    first: float | None = None
    ended: float = 0.0
    ttft_ms: float | None = None
    latency_ms: float | None = None
    itl_ms: list[float] = []  # gaps between events that carried tokens
    planned_tokens: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    route: str = ""
    reason: str = ""
    tiers: dict[str, int] = {}  # cached tokens by tier, where the server says so
    load_ms: float | None = None
    saved_ms: float | None = None
    load_reason: str = ""  # why the engine loaded what the cache had, or computed it
    request_id: str = ""

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def key(self) -> tuple[str, str, int]:
        """The same request in another arm or repetition."""
        return (self.stage, self.session, self.step)


_COLUMNS = (
    "arm", "repetition", "stage", "group", "session", "step", "phase", "status", "error", "intended", "sent", "first", "ended",
    "ttft_ms", "latency_ms", "itl_p50_ms", "itl_p99_ms", "itl_max_ms", "planned_tokens", "prompt_tokens", "output_tokens",
    "cached_tokens", "tiers", "load_ms", "saved_ms", "load_reason", "route", "reason", "request_id",
)  # fmt: skip


def write_csv(file: Path, records: Iterable[Record]) -> None:
    """One line a request; gaps between tokens as percentiles (the JSON has them all)."""
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(_COLUMNS)
        for record in records:
            row = {name: getattr(record, name) for name in _COLUMNS if hasattr(record, name)}
            gaps = sorted(record.itl_ms)
            row |= {f"itl_{name}_ms": _nearest(gaps, q) for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}
            row["tiers"] = " ".join(f"{tier}={n}" for tier, n in record.tiers.items())
            writer.writerow([_cell(row[name]) for name in _COLUMNS])


def _nearest(ordered: list[float], q: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None


def _cell(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else ("" if value is None else value)

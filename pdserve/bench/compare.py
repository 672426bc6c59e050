"""Arms beside each other: one table, and for each metric one sentence that says who is ahead, or that nobody is. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from pdserve.bench import stats
from pdserve.bench.record import Record
from pdserve.bench.results import Result
from pdserve.bench.stats import Ratio, Sample
from pdserve.bench.summary import Summary, latency, measured, spans, summarise, ttft

T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Metric:
    """`of` gives a request's values (milliseconds); `rate` a repetition's value; `counts` says of a request whether it counts. One of
    the three is set."""

    name: str
    better: str  # lower or higher
    unit: str
    statistic: stats.Statistic | None = None
    of: Callable[[Record, float], Sequence[float]] | None = None
    rate: Callable[[Sequence[Record]], float] | None = None
    counts: Callable[[Record, float, float], bool] | None = None


def _first(record: Record, timeout: float) -> Sequence[float]:
    return (ttft(record, timeout),)


def _whole(record: Record, timeout: float) -> Sequence[float]:
    return (latency(record, timeout),)


def _gaps(record: Record, timeout: float) -> Sequence[float]:
    return record.itl_ms


def _tokens_per_second(rows: Sequence[Record]) -> float:
    return sum(r.output_tokens for r in rows) / (sum(b - a for a, b in spans(rows)) or 1e-9)


def _within(record: Record, timeout: float, slo: float) -> bool:
    return ttft(record, timeout) <= slo * 1000


METRICS = (
    Metric("TTFT mean", "lower", "ms", stats.mean, _first),
    Metric("TTFT p50", "lower", "ms", stats.quantile(0.5), _first),
    Metric("TTFT p99", "lower", "ms", stats.quantile(0.99), _first),
    Metric("ITL p50", "lower", "ms", stats.quantile(0.5), _gaps),
    Metric("ITL p99", "lower", "ms", stats.quantile(0.99), _gaps),
    Metric("latency p50", "lower", "ms", stats.quantile(0.5), _whole),
    Metric("output tok/s", "higher", "tok/s", rate=_tokens_per_second),
    Metric("requests within the target", "higher", "", counts=_within),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    metric: str
    group: str  # "" for all requests
    a: str
    b: str
    ratio: Ratio
    sentence: str


#: the requests that a workload is about; the others are there to make them what they are
FOCUS = {"pd-interference": "decode, busy", "long-doc-qa": "repeat"}


PLAIN, WITHOUT_LOADS = "gpu-cache", ("no-cache", "pd", "nixl", "cache-never")
FOUND_MORE, FOUND_NONE = 0.05, 0.01  # of all prompt tokens
REASONS = 3  # of failures, that are told


def focus(result: Result) -> str | None:
    """The group that verdicts are given of; None: all requests."""
    name = FOCUS.get(result.workload)
    return name if any(r.group == name for r in result.records) else None


def verdicts(result: Result, group: str | None = None) -> list[Verdict]:
    """Every pair of arms under every metric, the first arm as the baseline of its pairs."""
    found = []
    arms = result.arms
    for metric in METRICS:
        if metric.counts is not None and result.slo is None:
            continue  # no target was given
        for i, a in enumerate(arms):
            for b in arms[i + 1 :]:
                ratio = _ratio(metric, result, a, b, group)
                if ratio is not None:
                    found.append(Verdict(metric.name, group or "", a, b, ratio, sentence(metric, a, b, ratio)))
    return found


def disturbance(result: Result) -> list[str]:
    """Of streams that ran alone and then beside long prompts: each arm's tail beside its own idle one, a sentence each."""
    found = []
    metric = next(m for m in METRICS if m.name == "ITL p99")
    assert metric.statistic
    for arm in result.arms:
        idle, busy = (
            [_sample(rows, metric, result.timeout) for rows in _repetitions(result, arm, f"decode, {when}")]
            for when in ("idle", "busy")
        )
        ratio = stats.ratio(idle, busy, metric.statistic, result.seed) if idle and busy else None
        if ratio is None:
            continue
        surely = (
            "one turn"
            if ratio.low is None or ratio.high is None
            else f"95 % between {ratio.low:.3f} and {ratio.high:.3f}"
        )
        found.append(f"{arm or 'ITL p99'}: ITL p99 beside long prompts is {ratio.value:.3f} of idle ({surely}).")
    return found


def failures(result: Result) -> list[str]:
    """Of each arm in which requests failed: how many, and why, the most frequent reasons first."""
    found = []
    for arm in result.arms:
        rows = measured(result.of(arm))
        why = Counter(r.error or r.status for r in rows if not r.ok)
        if why:
            shown = [f"{n} x {words}" for words, n in why.most_common(REASONS)]
            more = [f"{len(why) - REASONS} other reasons"] if len(why) > REASONS else []
            whose = f"{arm}: " if arm else ""
            found.append(f"{whose}{why.total()} of {len(rows)} requests failed: {'; '.join([*shown, *more])}.")
    return found


def idle_caches(result: Result) -> list[str]:
    """Where one arm found much more in its caches than plain vLLM did: a sentence for each other one that found no more. It may have
    been plain vLLM itself."""
    found = {arm: summarise(result.of(arm), result.timeout) for arm in result.arms}
    shares = {arm: s.cached for arm, s in found.items() if s is not None and s.cached is not None}
    plain = shares.get(PLAIN)
    if plain is None or max(shares.values()) < plain + FOUND_MORE:
        return []
    return [
        f"{arm} found {share:.0%} of its prompt tokens cached, {PLAIN} {plain:.0%}: what {arm} has below the GPU gave nothing."
        for arm, share in shares.items()
        if arm not in (PLAIN, *WITHOUT_LOADS) and share < plain + FOUND_NONE
    ]


def _ratio(metric: Metric, result: Result, a: str, b: str, group: str | None) -> Ratio | None:
    left, right = _repetitions(result, a, group), _repetitions(result, b, group)
    if metric.rate is not None:
        return stats.rate_ratio([metric.rate(rows) for rows in left], [metric.rate(rows) for rows in right])
    if metric.counts is not None:
        if result.slo is None:
            return None
        named = [[_counted(rows, metric.counts, result.timeout, result.slo) for rows in side] for side in (left, right)]
        return stats.count_ratio(named[0], named[1], result.seed)
    assert metric.of
    assert metric.statistic
    samples = [[_sample(rows, metric, result.timeout) for rows in side] for side in (left, right)]
    return stats.ratio(samples[0], samples[1], metric.statistic, result.seed)


def _counted(
    rows: Sequence[Record], counts: Callable[[Record, float, float], bool], timeout: float, slo: float
) -> set[object]:
    return {r.key for r in rows if counts(r, timeout, slo)}


def _repetitions(result: Result, arm: str, group: str | None) -> list[list[Record]]:
    numbers = sorted({run.repetition for run in result.runs if run.arm == arm})
    found = [[r for r in measured(result.of(arm, n)) if group in (None, r.group)] for n in numbers]
    return [rows for rows in found if rows]


def _sample(rows: Sequence[Record], metric: Metric, timeout: float) -> Sample:
    assert metric.of
    return Sample(tuple(r.key for r in rows), tuple(metric.of(r, timeout) for r in rows))


def sentence(metric: Metric, a: str, b: str, ratio: Ratio) -> str:
    """Who is ahead, by how much, how surely."""
    if ratio.low is None or ratio.high is None:
        return f"{metric.name}: {b} / {a} = {ratio.value:.3f}; too few repetitions or requests to say whether that is chance."
    between = f"95 % between {ratio.low:.3f} and {ratio.high:.3f}"
    if not ratio.differs:
        return f"{metric.name}: no difference between {a} and {b} ({ratio.value:.3f} of it, {between})."
    ahead, behind = (b, a) if (ratio.value < 1) == (metric.better == "lower") else (a, b)
    factor = ratio.value if ratio.value > 1 else 1 / ratio.value if ratio.value else float("inf")
    word = "times lower" if metric.better == "lower" else "times higher"
    size = (
        f"{factor:.2f} {word}"
        if factor >= 1.1
        else f"{abs(ratio.value - 1):.1%} {'lower' if metric.better == 'lower' else 'higher'}"
    )
    return f"{metric.name}: {ahead} is {size} than {behind} ({b} / {a} = {ratio.value:.3f}, {between})."


# ---- the table ----

COLUMNS = (
    "arm",
    "requests",
    "failed",
    "TTFT mean",
    "p50",
    "p99",
    "ITL p50",
    "p99",
    "latency p50",
    "out tok/s",
    "cached",
)


def rows(result: Result, group: str | None = None) -> list[list[str]]:
    """One line per arm. With a target, one more column: how many kept it."""
    found = []
    for arm in result.arms:
        records = [r for r in result.of(arm) if group in (None, r.group)]
        summary = summarise(records, result.timeout, result.slo)
        if summary is not None:
            found.append([arm or "-", *_cells(summary)])
    return found


def columns(result: Result) -> list[str]:
    return [*COLUMNS, *([f"TTFT <= {result.slo:g} s"] if result.slo is not None else [])]


def _cells(s: Summary) -> list[str]:
    cells = [
        str(s.requests),
        str(s.failed),
        _ms(s.ttft_mean),
        _ms(s.ttft_p50),
        _ms(s.ttft_p99),
        _ms(s.itl_p50),
        _ms(s.itl_p99),
    ]
    cells += [_ms(s.latency_p50), f"{s.output_rate:.1f}", "-" if s.cached is None else f"{s.cached:.0%}"]
    return cells + ([] if s.within_slo is None else [str(s.within_slo)])


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.1f} ms"


def merged(a: Result, b: Result, names: tuple[str, str]) -> Result:
    """Two files as two arms of one result. What makes them hard to compare is noted, not hidden."""
    notes = []
    for field in ("workload", "seed", "timeout", "machine", "parameters"):
        one, other = getattr(a, field), getattr(b, field)
        if isinstance(one, dict):
            differing = [k for k in {**one, **other} if one.get(k) != other.get(k) and k not in ("word", "load")]
            notes += [f"The two differ in {field}, {k}: {one.get(k)} and {other.get(k)}." for k in differing]
        elif one != other:
            notes.append(f"The two differ in {field}: {one} and {other}.")
    notes.append("The two did not run in turns: a drift of the machine between them counts as a difference.")
    whole = Result(
        workload=a.workload, command=f"{a.command}\n{b.command}", started=a.started, seed=a.seed, parameters=a.parameters,
        timeout=max(a.timeout, b.timeout), slo=a.slo, machine=a.machine, versions=a.versions, notes=notes,
    )  # fmt: skip
    for name, one in zip(names, (a, b), strict=True):
        many = len(one.arms) > 1
        for run in one.runs:
            whole.runs.append(_renamed(run, f"{name}:{run.arm}" if many else name))
        whole.records += [_renamed(record, f"{name}:{record.arm}" if many else name) for record in one.records]
    return whole


def _renamed(thing: T, arm: str) -> T:
    return msgspec.structs.replace(thing, arm=arm)

"""At every point: which fixed arm is best, and is the adaptive one within noise of it? Over all points: is it ahead of each? Pure.

The best of several fixed arms is partly the luckiest, so the judgement leans against the adaptive one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.bench import stats
from pdserve.bench.record import Record
from pdserve.bench.results import Result
from pdserve.bench.stats import Ratio, Sample
from pdserve.bench.summary import measured, ttft

ADAPTIVES = ("pd+adaptive", "cache")  # the arms that decide by themselves; of two, the first is judged
WORDS = {True: "ahead", False: "behind"}


@dataclass(frozen=True, slots=True)
class Judged:
    """One point. `means`: TTFT mean in milliseconds by arm; `ratio`: adaptive / best fixed."""

    point: str
    means: dict[str, float]
    best: str
    ratio: Ratio | None
    decisions: dict[str, int]

    @property
    def verdict(self) -> str:
        if self.ratio is None or self.ratio.differs is None:
            return "too little to say"
        return WORDS[self.ratio.value < 1] if self.ratio.differs else "level"

    @property
    def decided(self) -> str:
        """What the engines decided at this point, the most frequent first."""
        ordered = sorted(self.decisions.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {count}" for name, count in ordered if count) or "no hit"


def adaptive_of(arms: Sequence[str]) -> str:
    """The arm that is judged; "" if all are fixed."""
    return next((arm for arm in ADAPTIVES if arm in arms), "")


def judge(result: Result, adaptive: str) -> list[Judged]:
    fixed = [arm for arm in result.arms if arm != adaptive]
    rows = measured(result.records)
    found = []
    for point in dict.fromkeys(r.group for r in rows):
        here = {arm: [r for r in rows if r.arm == arm and r.group == point] for arm in result.arms}
        means = {arm: _mean(records, result.timeout) for arm, records in here.items() if records}
        known = [arm for arm in fixed if arm in means]
        if adaptive not in means or not known:
            continue
        best = min(known, key=means.__getitem__)
        ratio = stats.ratio(_samples(here[best], result), _samples(here[adaptive], result), stats.mean, result.seed)
        found.append(Judged(point, means, best, ratio, _decisions(result, adaptive, point)))
    return found


def overall(result: Result, adaptive: str) -> list[tuple[str, Ratio]]:
    """Adaptive against each fixed arm over all points; each request counts relative to its point's mean, so that no point drowns the
    others."""
    rows = measured(result.records)
    scale = {p: _mean([r for r in rows if r.group == p], result.timeout) for p in {r.group for r in rows}}

    def samples(arm: str) -> list[Sample]:
        return _samples([r for r in rows if r.arm == arm], result, scale)

    found = []
    for arm in result.arms:
        if arm != adaptive and (ratio := stats.ratio(samples(arm), samples(adaptive), stats.mean, result.seed)):
            found.append((arm, ratio))
    return found


def sentences(result: Result, adaptive: str, judged: Sequence[Judged]) -> list[str]:
    counts = {
        word: [j for j in judged if j.verdict == word] for word in ("ahead", "level", "behind", "too little to say")
    }
    said = [
        f"{adaptive} against the best fixed arm of each of {len(judged)} points: "
        + ", ".join(f"{word} at {len(at)}" for word, at in counts.items() if at)
        + "."
    ]
    for j in counts["behind"]:
        assert j.ratio is not None
        said.append(
            f"Behind at {j.point}: {j.ratio.value:.2f} times {j.best} (95 % between {j.ratio.low:.2f} and {j.ratio.high:.2f})."
        )
    for arm, ratio in overall(result, adaptive):
        if ratio.differs is None:
            said.append(
                f"Over the mix: {adaptive} / {arm} = {ratio.value:.3f}; too few turns to say whether that is chance."
            )
        elif ratio.differs:
            word = "strictly better" if ratio.value < 1 else "worse"
            said.append(
                f"Over the mix {adaptive} is {word} than {arm}: {ratio.value:.3f} (95 % between {ratio.low:.3f} and {ratio.high:.3f})."
            )
        else:
            said.append(
                f"Over the mix: no difference to {arm}: {ratio.value:.3f} (95 % between {ratio.low:.3f} and {ratio.high:.3f})."
            )
    return said


def table(result: Result, judged: Sequence[Judged]) -> tuple[list[str], list[list[str]]]:
    head = ["point", *result.arms, "decided", "best fixed", "ratio", "verdict"]
    rows = []
    for j in judged:
        times = [f"{j.means[arm]:.0f} ms" if arm in j.means else "-" for arm in result.arms]
        ratio = "-" if j.ratio is None else f"{j.ratio.value:.2f}"
        rows.append([j.point, *times, j.decided, j.best, ratio, j.verdict])
    return head, rows


def _mean(records: Sequence[Record], timeout: float) -> float:
    return sum(ttft(r, timeout) for r in records) / len(records)


def _samples(records: Sequence[Record], result: Result, scale: dict[str, float] | None = None) -> list[Sample]:
    found = []
    for number in sorted({r.repetition for r in records}):
        rows = [r for r in records if r.repetition == number]
        values = tuple((ttft(r, result.timeout) / (scale[r.group] if scale else 1.0),) for r in rows)
        found.append(Sample(tuple(r.key for r in rows), values))
    return found


def _decisions(result: Result, arm: str, point: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for run in result.runs:
        if run.arm == arm:
            for name, count in (run.facts.get("decisions") or {}).get(point, {}).items():
                found[name] = found.get(name, 0) + int(count)
    return found

"""Writes the tables of docs/benchmarks.md from raw results, so that no figure is copied by hand.

    python scripts/benchmark_tables.py [PAGE]

In the page, `<!-- figures: FOLDER -->` up to `<!-- end of figures -->` is replaced by what the results in that folder say (the
path is relative to the page), or by "Not run yet." where there is no such folder. One row for each metric of each pair of arms
in which pdserve takes part.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pdserve.bench import compare, results
from pdserve.bench.compare import Verdict
from pdserve.bench.regimes import judge
from pdserve.bench.results import Result
from pdserve.bench.stats import Ratio
from pdserve.bench.summary import summarise

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
MISSING = "Not run yet.\n"
OURS = ("cache", "cache-always", "pd", "pd+cache", "pd+adaptive")
FACTS = ("cpu", "cores", "gpus", "python", "torch", "vllm", "lmcache")
SHOWN = ("TTFT mean", "ITL p99", "output tok/s", "requests within the target")


@dataclass(frozen=True)
class Row:
    """A metric of one of our arms over another arm's, however the result itself orders the two."""

    workload: str
    metric: str
    ours: str
    theirs: str
    ratio: Ratio

    @property
    def verdict(self) -> str:
        if self.ratio.low is None or self.ratio.high is None:
            return "too few"
        if not self.ratio.differs:
            return "ties"
        better = next(m.better for m in compare.METRICS if m.name == self.metric)
        return "**wins**" if (self.ratio.value < 1) == (better == "lower") else "**loses**"

    @property
    def cells(self) -> list[str]:
        low, high = self.ratio.low, self.ratio.high
        between = "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        return [
            self.workload,
            f"{self.ours} / {self.theirs}",
            self.metric,
            f"{self.ratio.value:.3f}",
            between,
            self.verdict,
        ]


def row_of(name: str, verdict: Verdict) -> Row | None:
    """None where both arms are ours, or neither is."""
    if (verdict.a in OURS) == (verdict.b in OURS):
        return None
    if verdict.b in OURS:
        return Row(name, verdict.metric, verdict.b, verdict.a, verdict.ratio)
    r = verdict.ratio
    if not r.value:
        return None
    low, high = (1 / r.high if r.high else None), (1 / r.low if r.low else None)
    return Row(name, verdict.metric, verdict.a, verdict.b, Ratio(r.b, r.a, 1 / r.value, low, high))


def rows_of(name: str, result: Result) -> list[Row]:
    found = [row_of(name, v) for v in compare.verdicts(result, compare.focus(result)) if v.metric in SHOWN]
    return [row for row in found if row is not None]


def means(name: str, result: Result) -> list[str]:
    """One line per arm: what the ratios are made of."""
    group = compare.focus(result)
    lines = []
    for arm in result.arms:
        summary = summarise([r for r in result.of(arm) if group in (None, r.group)], result.timeout, result.slo)
        if summary is None:
            continue
        turns = len({run.repetition for run in result.runs if run.arm == arm})
        within = "-" if summary.within_slo is None else str(summary.within_slo)
        cached = "-" if summary.cached is None else f"{summary.cached:.0%}"
        cells = [
            name,
            arm or "-",
            turns,
            summary.requests,
            summary.failed,
            f"{summary.ttft_mean:.0f}",
            f"{summary.ttft_p99:.0f}",
        ]
        cells += [
            "-" if summary.itl_p50 is None else f"{summary.itl_p50:.2f}",
            "-" if summary.itl_p99 is None else f"{summary.itl_p99:.1f}",
            f"{summary.output_rate:.1f}",
            cached,
            within,
        ]
        lines.append(f"| {' | '.join(str(c) for c in cells)} |")
    return lines


def table(head: str, lines: list[str]) -> list[str]:
    names = head.split(", ")
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}", *lines, ""] if lines else []


def bullets(name: str, sentences: list[str]) -> list[str]:
    return [*(f"- {name}: {sentence}" for sentence in sentences), ""] if sentences else []


def hits(found: dict[str, Result]) -> list[str]:
    """NAME-miss and NAME-hit: the same prompts before and after a tier had them."""
    lines = []
    for stem, miss in found.items():
        name = stem.removesuffix("-miss")
        if stem.endswith("-miss") and (hit := found.get(f"{name}-hit")) is not None:
            both = compare.merged(miss, hit, ("miss", "hit"))
            tiers = Counter[str]()
            for record in hit.records:
                tiers.update(record.tiers)
            said = ", ".join(f"{tier} {tokens}" for tier, tokens in tiers.items() if tokens) or "nothing"
            shown = [v.sentence for v in compare.verdicts(both) if v.metric == "TTFT mean"]
            lines += bullets(
                name, [*shown, f"{sum(r.prompt_tokens for r in hit.records)} tokens asked again; from where: {said}."]
            )
    return lines


def regimes(name: str, result: Result) -> list[str]:
    """A sweep's points, each with its verdict, and what is true of the mix."""
    adaptive = judge.adaptive_of(result.arms)
    judged = judge.judge(result, adaptive)
    columns, cells = judge.table(result, judged)
    said = bullets(name, judge.sentences(result, adaptive, judged))
    return [*table(", ".join(columns), [f"| {' | '.join(row)} |" for row in cells]), *said]


def size_check(file: Path) -> list[str]:
    """`pdserve size --check --json`: the simulation beside the real run of the same plan."""
    if not file.is_file() or not (text := file.read_text().strip()):
        return []
    rows = json.loads(text)
    cells = [f"| {r['name']} | {r['simulated']:.4g} | {r['measured']:.4g} | {r['ratio'] - 1:+.1%} |" for r in rows]
    worst = max(rows, key=lambda r: abs(r["ratio"] - 1))
    said = f"size: of {len(rows)} figures the farthest off is {worst['name']}, by {worst['ratio'] - 1:+.1%}."
    return [*table("pdserve size, simulated, measured, error", cells), f"- {said}", ""]


def render(folder: Path) -> str:
    """Markdown of a folder's results: verdicts, then the figures behind them, then sweeps with their judgement."""
    if not folder.is_dir():
        return MISSING
    found = results.read_folder(folder)
    pairs = [(file.stem, result) for file, result in found if result.workload != "regimes" and len(result.arms) > 1]
    rows = [row for name, result in pairs for row in rows_of(name, result)]
    lines = table(
        "workload, arms, metric, ratio, 95 % between, pdserve", [f"| {' | '.join(row.cells)} |" for row in rows]
    )
    for name, result in pairs:
        lines += bullets(name, compare.disturbance(result))
    lines += hits({file.stem: result for file, result in found})
    head = "workload, arm, turns, requests, failed, TTFT mean ms, p99, ITL p50 ms, p99, out tok/s, cached, within target"
    lines += table(head, [line for name, result in pairs for line in means(name, result)])
    for file, result in found:
        if result.workload == "regimes":
            lines += regimes(file.stem, result)
    lines += size_check(folder / "size-check.json")
    first = found[0][1]
    facts = {**first.machine, **first.versions, "gpus": ", ".join(sorted(set(first.machine.get("gpus") or [])))}
    shown = ", ".join(f"{key} {facts[key]}" for key in FACTS if facts.get(key))
    return "\n".join([*lines, f"{shown}. Raw files: `{folder.name}/`.", ""])


def rewrite(page: Path) -> bool:
    """Whether anything changed."""
    text = page.read_text()
    new = BLOCK.sub(lambda m: m[1] + render(page.parent / m[2]) + m[3], text)
    page.write_text(new)
    return new != text


def main() -> int:
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    print(f"{'wrote' if rewrite(page) else 'up to date'}: {page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

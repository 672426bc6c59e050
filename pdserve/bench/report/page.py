"""The page: for each result its table, one sentence per metric, plots, and everything that is needed to run it again."""

from __future__ import annotations

import argparse
import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from pdserve.bench import compare, results
from pdserve.bench.regimes import judge
from pdserve.bench.results import Result
from pdserve.bench.summary import groups, phases
from pdserve.errors import ConfigError

WARNS = re.compile(r"do not believe|requests failed: ")
CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 0 auto; max-width: 1180px; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 44px 0 2px; border-top: 2px solid #1c1c1c; padding-top: 14px; }
h3 { font-size: 14px; margin: 22px 0 4px; } p { margin: 6px 0; max-width: 90ch; } .dim { color: #666; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; }
.wide { overflow-x: auto; } th { text-align: right; font-weight: 500; color: #666; padding: 3px 14px 3px 0; white-space: nowrap; }
td { text-align: right; padding: 3px 14px 3px 0; border-top: 1px solid #e8e8e8; white-space: nowrap; }
th:first-child, td:first-child, .text td { text-align: left; } .text td { white-space: normal; vertical-align: top;
  overflow-wrap: anywhere; }
.text td:first-child { color: #666; padding-right: 24px; overflow-wrap: normal; }
.dot { display: inline-block; width: 9px; height: 9px; margin-right: 7px; }
ul { margin: 4px 0; padding-left: 20px; columns: 2 480px; column-gap: 28px; font-size: 13.5px; }
li { margin: 2px 0; } .same { color: #777; } .warn { color: #a40000; font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 14px 28px; margin: 14px 0; }
.plots svg { width: 100%; height: auto; }
pre { background: #f5f5f5; padding: 8px 10px; white-space: pre-wrap; font-size: 12.5px; margin: 6px 0; }
details { margin: 8px 0; } summary { cursor: pointer; color: #666; } nav a { margin-right: 16px; } a { color: #0057a8; }
"""


def main(args: argparse.Namespace) -> int:
    file = write(args.folder, args.out)
    if args.json:
        from pdserve import output

        return output.print_json({"file": str(file), "results": [str(f) for f, _ in results.read_folder(args.folder)]})
    print(file)
    return 0


def write(folder: Path, file: Path | None = None) -> Path:
    """The page of every result below the folder; where it was written."""
    file = file or folder / "report.html"
    file.write_text(page(results.read_folder(folder)))
    return file


def page(found: Sequence[tuple[Path, Result]]) -> str:
    links = "".join(f'<a href="#r{n}">{_e(path.stem)}</a>' for n, (path, _) in enumerate(found))
    parts = [section(n, path.stem, result) for n, (path, result) in enumerate(found)]
    nav = f"<nav>{links}</nav>" if len(found) > 1 else ""
    title = "Benchmark" if len(found) > 1 else f"Benchmark: {found[0][1].workload}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_e(title)}</title><style>{CSS}</style></head>'
        f"<body><h1>{_e(title)}</h1>{nav}{''.join(parts)}</body></html>\n"
    )


def section(number: int, name: str, result: Result) -> str:
    counts = phases(result.records)
    facts = f"{counts.get('measured', 0)} requests measured, seed {result.seed}, {result.started}"
    left = ", ".join(f"{n} {phase}" for phase, n in counts.items() if phase != "measured")
    title = name if name == result.workload else f"{name} ({result.workload})"
    return "".join(
        (
            f'<h2 id="r{number}">{_e(title)}</h2><p class="dim">{_e(facts)}{_e(f"; not counted: {left}" if left else "")}</p>',
            _notes(result),
            _judgement(result) if result.workload == "regimes" else _tables(result),
            f'<div class="plots">{"".join(f"<figure style=margin:0>{plot}</figure>" for plot in _plots(result) if plot)}</div>',
            _verdicts(result),
            _again(result),
        )
    )


def _plots(result: Result) -> list[str]:
    try:
        from pdserve.bench.report import plots
    except ModuleNotFoundError as error:
        raise ConfigError("report", f"{error.name} is not installed", "pip install 'pdserve[bench]'") from error

    drawn: tuple[Callable[[Result], str], ...] = (
        plots.regimes,
        plots.crossover,
        plots.ramp,
        plots.ttft_cdf,
        plots.ttft_over_time,
        plots.gaps,
    )
    return [draw(result) for draw in drawn]


def _notes(result: Result) -> str:
    return "".join(
        f'<p class="{"warn" if WARNS.search(note) else "dim"}">{_e(note)}</p>' for note in result.notes
    )


def _tables(result: Result) -> str:
    names = groups(result.records)
    shown = [None, *(names if 1 < len(names) <= 12 else [])]
    parts = []
    for group in shown:
        rows = compare.rows(result, group)
        if rows:
            parts.append(f"<h3>{_e(group or 'All requests')}</h3>" if len(shown) > 1 else "")
            parts.append(_table(result, rows))
    return "".join(parts)


def _judgement(result: Result) -> str:
    """Of a sweep: every point in a line."""
    adaptive = judge.adaptive_of(result.arms)
    judged = judge.judge(result, adaptive)
    columns, rows = judge.table(result, judged)
    head = "".join(f"<th>{_e(c)}</th>" for c in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_e(c)}</td>' for c in row)}</tr>" for row in rows)
    items = "".join(f"<li>{_e(s)}</li>" for s in judge.sentences(result, adaptive, judged))
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div><ul>{items}</ul>'


def _table(result: Result, rows: list[list[str]]) -> str:
    from pdserve.bench.report.plots import COLOURS

    head = "".join(f"<th>{_e(c)}</th>" for c in compare.columns(result))
    body = []
    for row in rows:
        arms = result.arms
        shade = COLOURS[arms.index(row[0]) % len(COLOURS)] if row[0] in arms and len(arms) > 1 else ""
        dot = f'<span class="dot" style="background:{shade}"></span>' if shade else ""
        cells = "".join(f"<td>{_e(c)}</td>" for c in row[1:])
        body.append(f"<tr><td>{dot}{_e(row[0])}</td>{cells}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _verdicts(result: Result) -> str:
    focus = compare.focus(result)
    found = compare.verdicts(result, focus)
    alone = compare.disturbance(result)
    if not found and not alone:
        return ""
    items = "".join(f'<li class="{"" if v.ratio.differs else "same"}">{_e(v.sentence)}</li>' for v in found)
    items += "".join(f"<li>{_e(sentence)}</li>" for sentence in alone)
    return f"<h3>Verdicts{_e(f': {focus}' if focus else '')}</h3><ul>{items}</ul>"


def _again(result: Result) -> str:
    rows = {
        "machine": ", ".join(f"{k} {v}" for k, v in result.machine.items()),
        "versions": ", ".join(f"{k} {v}" for k, v in result.versions.items()),
        "client overhead": ", ".join(f"{k} {v:.2f}" for k, v in result.overhead.items()) or "not measured",
        "client lateness, p99": ", ".join(
            f"{r.arm or 'run'} #{r.repetition}: {r.lag_p99_ms:.1f} ms" for r in result.runs
        ),
        "timeout": f"{result.timeout:g} s; a failed request counts as this at least",
        "parameters": ", ".join(
            f"{k}={v}" for k, v in result.parameters.items() if v is not None and v != "" and v is not False
        ),
    }
    cells = "".join(f"<tr><td>{_e(k)}</td><td>{_e(v)}</td></tr>" for k, v in rows.items())
    topologies = {run.arm: run.facts["topology"] for run in result.runs if "topology" in run.facts}
    texts = "".join(
        f"<h3>{_e(arm)}</h3><pre>{_e(yaml.safe_dump(raw, sort_keys=False))}</pre>" for arm, raw in topologies.items()
    )
    arms = f"<details><summary>Topology of each arm</summary>{texts}</details>" if texts else ""
    return f"<h3>To run it again</h3><pre>{_e(result.command)}</pre><table class=text>{cells}</table>{arms}"


def _e(text: str) -> str:
    return html.escape(str(text))

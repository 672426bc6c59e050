"""Plots of a result as inline SVG, by matplotlib. Each returns "" where there is nothing to show."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pdserve.bench.record import Record
from pdserve.bench.results import Result
from pdserve.bench.summary import groups, measured, quantile, ttft

# Okabe and Ito's colours: told apart by the colour-blind as well. Arms keep theirs in every plot of a page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8a8a8a")
GREY = "#999999"
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "pdserve", "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.8, "legend.frameon": False,
    "axes.axisbelow": True,
}  # fmt: skip
LOG_FROM = 8.0  # a range that spans more than this factor is drawn on a logarithmic axis


def figure(width: float = 5.4, height: float = 3.1) -> tuple[Figure, Axes]:
    with mpl.rc_context(STYLE):
        made = Figure(figsize=(width, height), layout="constrained")
        return made, made.subplots()


def svg(made: Figure, label: str) -> str:
    out = io.StringIO()
    with mpl.rc_context(STYLE):
        made.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{label}" ', text, count=1)


def colour(result: Result, arm: str) -> str:
    return COLOURS[result.arms.index(arm) % len(COLOURS)]


def _seconds(values: Sequence[float]) -> tuple[float, str]:
    """(factor, unit) in which milliseconds are shown."""
    return (0.001, "s") if values and max(values) >= 2000 else (1.0, "ms")


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontweight="bold", fontsize=10)


def _spread(axes: Axes, values: Sequence[float], axis: str) -> None:
    """A logarithmic axis, with plain numbers at 1, 2 and 5, where the values are far apart."""
    positive = [v for v in values if v > 0]
    if positive and max(positive) / min(positive) > LOG_FROM:
        getattr(axes, f"set_{axis}scale")("log")
        line = axes.xaxis if axis == "x" else axes.yaxis
        decades = max(positive) / min(positive) > 300
        line.set_major_locator(ticker.LogLocator(subs=(1,) if decades else (1, 2, 5)))
        line.set_major_formatter(ticker.FuncFormatter(lambda value, place: f"{value:g}"))
        line.set_minor_formatter(ticker.NullFormatter())


def ttft_cdf(result: Result) -> str:
    """Share of requests answered within a time; a failure never comes, so its arm's curve ends below 1."""
    shown = {arm: [r for r in measured(result.of(arm))] for arm in result.arms}
    every = [r.ttft_ms for rows in shown.values() for r in rows if r.ok and r.ttft_ms]
    if not every:
        return ""
    factor, unit = _seconds(every)
    made, axes = figure()
    for arm, rows in shown.items():
        times = sorted(r.ttft_ms * factor for r in rows if r.ok and r.ttft_ms)
        if times:
            shares = [(n + 1) / len(rows) for n in range(len(times))]
            axes.step(
                [times[0], *times], [0, *shares], where="post", color=colour(result, arm), label=arm or None, lw=1.7
            )
    if result.slo is not None:
        axes.axvline(result.slo * 1000 * factor, color=GREY, ls="--", lw=1, label=f"target {result.slo:g} s")
    _spread(axes, [t * factor for t in every], "x")
    axes.set(xlabel=f"time to first token, {unit}", ylabel="share of requests", ylim=(0, 1.02))
    _title(axes, "Time to first token")
    _legend(axes)
    return svg(made, "distribution of the time to first token")


def ttft_over_time(result: Result) -> str:
    """Every request at its intended start; what was not counted in grey, failures as crosses at the timeout."""
    every = [ttft(r, result.timeout) for r in result.records]
    if not every:
        return ""
    factor, unit = _seconds(every)
    made, axes = figure()
    skipped = [r for r in result.records if r.phase != "measured" and r.ok]
    if skipped:
        axes.scatter(
            [r.intended for r in skipped], [ttft(r, result.timeout) * factor for r in skipped],
            s=9, color="#c8c8c8", label="not counted",
        )  # fmt: skip
    for number, arm in enumerate(result.arms):
        rows = [r for r in measured(result.of(arm)) if r.ok]
        axes.scatter(
            [r.intended for r in rows], [ttft(r, result.timeout) * factor for r in rows], s=13, alpha=0.75, linewidths=0,
            color=colour(result, arm), marker=MARKS[number % len(MARKS)], label=arm or None,
        )  # fmt: skip
    failed = [r for r in measured(result.records) if not r.ok]
    if failed:
        places = [ttft(r, result.timeout) * factor for r in failed]
        axes.scatter([r.intended for r in failed], places, marker="x", color="#cc0000", s=26, label="failed")
    _spread(axes, [t * factor for t in every], "y")
    axes.set(xlabel="intended start, s since the turn began", ylabel=unit)
    _title(axes, "Time to first token over the run")
    _legend(axes)
    return svg(made, "time to first token over time")


def gaps(result: Result) -> str:
    """Time between tokens, by arm, and by group where the workload has streams that are disturbed."""
    names = [g for g in groups(result.records) if g.startswith("decode")] or [""]
    lines = []
    for number, arm in enumerate(result.arms):
        for style, group in enumerate(names):
            rows = [r for r in measured(result.of(arm)) if group in ("", r.group)]
            values = sorted(gap for r in rows for gap in r.itl_ms)
            if values:
                label = " ".join(filter(None, [arm, group.removeprefix("decode, ")]))
                lines.append(
                    (values, label, COLOURS[number % len(COLOURS)], LINES[(len(names) - 1 - style) % len(LINES)])
                )
    if not lines:
        return ""
    made, axes = figure()
    for values, label, shade, line in lines:
        tail = [max(1e-4, 1 - n / len(values)) for n in range(len(values))]
        axes.plot(_thin(values), _thin(tail), color=shade, ls=line, label=label or None, lw=1.6)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, place: f"{value:.4g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    _spread(axes, [v for values, *_ in lines for v in values[-1:] + values[:1]], "x")
    axes.set(xlabel="time between tokens, ms", ylabel="share of gaps that are longer")
    _title(axes, "Time between tokens: the tail")
    _legend(axes)
    return svg(made, "tail of the time between tokens")


def _thin(values: Sequence[float], most: int = 1500) -> list[float]:
    """Evenly picked, the last ones all: a plot needs no more, and the tail is what it is for."""
    step = max(1, len(values) // most)
    return [*values[: -200 or None : step], *values[-200:]]


def crossover(result: Result) -> str:
    """First tokens over the swept quantity: the working set, or the share that was cached."""
    swept = _swept(result)
    if len(swept) < 2:
        return ""
    every = [t for rows in swept.values() for r in rows for t in [ttft(r, result.timeout)]]
    factor, unit = _seconds(every)
    made, axes = figure()
    for number, arm in enumerate(result.arms):
        points = [
            (x, [ttft(r, result.timeout) * factor for r in rows if r.arm == arm]) for x, rows in sorted(swept.items())
        ]
        points = [(x, times) for x, times in points if times]
        if not points:
            continue
        xs, shade = [x for x, _ in points], colour(result, arm)
        axes.plot(
            xs,
            [quantile(t, 0.5) for _, t in points],
            marker=MARKS[number % len(MARKS)],
            ms=5,
            color=shade,
            label=arm or None,
        )
        axes.fill_between(
            xs,
            [quantile(t, 0.1) for _, t in points],
            [quantile(t, 0.9) for _, t in points],
            color=shade,
            alpha=0.12,
            lw=0,
        )
    what = "working set, tokens" if result.workload == "working-set" else "part of the prompt sent before, %"
    if result.workload == "working-set":
        _spread(axes, list(swept), "x")
    _spread(axes, [t * factor for t in every], "y")
    axes.set(xlabel=what, ylabel=f"TTFT p50, {unit} (shaded: p10 to p90)")
    _title(axes, "Where one arm overtakes the other")
    _legend(axes)
    return svg(made, "first tokens over the swept quantity")


def _swept(result: Result) -> dict[float, list[Record]]:
    found: dict[float, list[Record]] = {}
    pattern = {"working-set": r"set (\d+)$", "cache-rate": r"(\d+) %$"}.get(result.workload)
    for r in measured(result.records) if pattern else []:
        if number := re.match(pattern or "", r.stage):
            found.setdefault(float(number[1]), []).append(r)
    return found


POINT = re.compile(r"set (\d+), (length (\d+), reuse (\d+) %, users \d+)$")  # as grid.Point names it


def regimes(result: Result) -> str:
    """Of a sweep over several quantities: a panel for each prompt length, reuse and load, first tokens over the working set."""
    panels: dict[str, dict[float, list[Record]]] = {}
    for r in measured(result.records) if result.workload == "regimes" else []:
        if found := POINT.match(r.group):
            panels.setdefault(found[2], {}).setdefault(float(found[1]), []).append(r)
    panels = {name: sets for name, sets in panels.items() if len(sets) > 1}
    if not panels:
        return ""
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    with mpl.rc_context(STYLE):
        made = Figure(figsize=(2.7 * across if across > 1 else 5.4, 0.4 + 2.3 * down), layout="constrained")
        grid = made.subplots(down, across, squeeze=False)
    for axes, (name, sets) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, result, name, sets)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    _legend(grid[0][0])
    with mpl.rc_context(STYLE):
        made.suptitle("Where one arm overtakes another", x=0.01, ha="left", fontweight="bold", fontsize=10)
    return svg(made, "first tokens over the working set, by length, reuse and users")


def _panel(axes: Axes, result: Result, name: str, sets: dict[float, list[Record]]) -> None:
    every = []
    for number, arm in enumerate(result.arms):
        times = {x: [ttft(r, result.timeout) for r in rows if r.arm == arm] for x, rows in sorted(sets.items())}
        means = {x: sum(t) / len(t) for x, t in times.items() if t}
        every += list(means.values())
        mark = MARKS[number % len(MARKS)]
        axes.plot(list(means), list(means.values()), marker=mark, ms=4, lw=1.2, color=colour(result, arm), label=arm)
    _spread(axes, list(sets), "x")
    _spread(axes, every, "y")
    axes.set_ylim(bottom=None if axes.get_yscale() == "log" else 0)
    axes.set_title(name, loc="left", fontsize=8)
    axes.set_xlabel("working set, tokens", fontsize=8)
    axes.set_ylabel("TTFT mean, ms", fontsize=8)
    axes.tick_params(labelsize=8)


def ramp(result: Result) -> str:
    """Users and the quantile that steered them, period by period."""
    runs = [run for run in result.runs if run.periods]
    if not runs or result.slo is None:
        return ""
    made, axes = figure()
    for number, run in enumerate(runs):
        shade = colour(result, run.arm)
        known = [(p.users, p.ttft) for p in run.periods if p.ttft is not None]
        axes.plot(
            [users for users, _ in known], [time for _, time in known], marker=MARKS[number % len(MARKS)], ms=4, lw=0.8, color=shade,
            alpha=0.8, label=run.arm if run.repetition <= 1 and run.arm else None,
        )  # fmt: skip
    axes.axhline(result.slo, color=GREY, ls="--", lw=1, label=f"target {result.slo:g} s")
    _spread(axes, [p.ttft for run in runs for p in run.periods if p.ttft], "y")
    axes.set(xlabel="users at a time", ylabel="TTFT p95 of a period, s")
    _title(axes, "How many users it takes")
    _legend(axes)
    return svg(made, "first tokens by number of users")


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        with mpl.rc_context(STYLE):
            axes.legend(fontsize=8)

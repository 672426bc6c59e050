"""The page: it has what a reader needs, every plot where there is something to plot, and nothing that is fetched."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra bench)")

from pdserve.bench import results
from pdserve.bench.ramp import Period
from pdserve.bench.record import Record
from pdserve.bench.report import page, plots
from pdserve.bench.results import Result, Run

RNG = random.Random(3)


def record(arm: str, stage: str, n: int, ttft: float, **more: object) -> Record:
    facts: dict = {
        "arm": arm, "repetition": 1, "stage": stage, "group": stage, "session": f"s{n}", "step": 0, "intended": float(n),
        "ended": n + ttft / 1000, "ttft_ms": ttft, "latency_ms": ttft, "itl_ms": [5.0, 6.0, RNG.uniform(5, 300)],
        "prompt_tokens": 100, "output_tokens": 4,
    }  # fmt: skip
    return Record(**(facts | more))


def sweep() -> Result:
    found = Result(
        workload="working-set", command="pdserve bench working-set <x>", seed=4, timeout=60, slo=2.0,
        machine={"cpu": "a & b"}, versions={"python": "3"}, notes=["Left out: something."],
    )  # fmt: skip
    for arm, slow in (("gpu-cache", 3000.0), ("cache", 400.0)):
        found.runs.append(Run(arm=arm, repetition=1, seconds=1, facts={"topology": {"name": f"bench-{arm}"}}))
        found.records += [record(arm, "fill 8000", n, 3000, phase="fill") for n in range(2)]
        found.records += [record(arm, "set 8000", n, RNG.uniform(100, 200)) for n in range(6)]
        found.records += [record(arm, "set 80000", n, slow * RNG.uniform(0.8, 1.2)) for n in range(6)]
    found.records.append(record("cache", "set 80000", 9, 60000, status="timeout", ttft_ms=None, latency_ms=None))
    return found


def ramped() -> Result:
    found = Result(workload="trace-replay", command="", seed=4, timeout=60, slo=2.0)
    periods = [Period(n * 10.0, n, 0.4 * n, 9, 9) for n in range(1, 7)]
    found.runs.append(Run(arm="", repetition=1, seconds=60, periods=periods, carried_users=5))
    found.records = [record("", "conversations", n, 500) for n in range(5)]
    return found


@pytest.mark.parametrize("draw", [plots.ttft_cdf, plots.ttft_over_time, plots.gaps, plots.crossover, plots.ramp])
def test_every_plot_is_an_svg_or_nothing(draw) -> None:  # type: ignore[no-untyped-def]
    drawn = [draw(result) for result in (sweep(), ramped())]
    assert any(drawn)
    for text in filter(None, drawn):
        root = ElementTree.fromstring(text)
        assert root.tag.endswith("svg")
        assert root.attrib["role"] == "img"
    assert draw(Result(workload="random", command="", seed=0, timeout=1)) == ""


def test_a_sweep_of_points_has_a_panel_for_each_that_has_several_working_sets() -> None:
    found = Result(workload="regimes", command="", seed=0, timeout=60)
    for arm in ("gpu-cache", "cache"):
        found.runs.append(Run(arm=arm, repetition=1, seconds=1))
        for size, length, reuse in ((2000, 300, 90), (60000, 300, 90), (2000, 1500, 90), (60000, 1500, 90), (300, 300, 0)):
            name = f"set {size}, length {length}, reuse {reuse} %, users 1"
            found.records += [record(arm, name, n, size / 10 if arm == "gpu-cache" else 90) for n in range(3)]
    text = plots.regimes(found)
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert "length 300, reuse 90 %, users 1" in text
    assert "length 1500, reuse 90 %, users 1" in text
    assert "reuse 0 %" not in text
    assert plots.regimes(sweep()) == ""


def test_sweeps_and_ramps_are_drawn_for_those_who_have_them() -> None:
    assert plots.crossover(ramped()) == "" != plots.crossover(sweep())
    assert plots.ramp(sweep()) == "" != plots.ramp(ramped())


def test_the_page_has_what_is_needed_to_judge_and_repeat(tmp_path: Path) -> None:
    results.write(sweep(), tmp_path)
    results.write(ramped(), tmp_path / "more")
    text = page.write(tmp_path).read_text()
    for wanted in ("working-set", "trace-replay", "seed 4", "pdserve bench working-set &lt;x&gt;", "a &amp; b", "Left out: something.",
                   "4 fill", "name: bench-cache", "TTFT &lt;= 2 s", "60 s; a failed request counts"):  # fmt: skip
        assert wanted in text, wanted
    assert text.count("<svg") == 4 + 4
    assert not re.search(r"<script|src=|@import|url\(http", text), "nothing is fetched, nothing runs"


def test_the_command_writes_it(tmp_path: Path) -> None:
    results.write(sweep(), tmp_path)
    command = [
        sys.executable,
        "-P",
        "-m",
        "pdserve",
        "bench",
        "report",
        str(tmp_path),
        "--out",
        str(tmp_path / "page.html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").stat().st_size > 10_000
    empty = subprocess.run(
        [*command[:6], str(tmp_path / "nothing")], capture_output=True, text=True, timeout=60, check=False
    )
    assert empty.returncode == 2
    assert "--out DIR" in empty.stderr

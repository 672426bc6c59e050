"""The tables of docs/benchmarks.md: which way a ratio points, what is said of it, and that a page is rewritten in place."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from pdserve.bench import results
from pdserve.bench.record import Record
from pdserve.bench.results import Result, Run

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("benchmark_tables", ROOT / "scripts" / "benchmark_tables.py")
assert spec
assert spec.loader
tables = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = tables
spec.loader.exec_module(tables)


def result(firsts: dict[str, float]) -> Result:
    """Three turns of five requests; every arm's first token always takes as long as told."""
    found = Result(
        workload="random", command="pdserve bench random", seed=1, timeout=60.0, machine={"cpu": "abacus", "cores": 2}
    )
    for arm, ttft in firsts.items():
        for turn in (1, 2, 3):
            found.runs.append(Run(arm=arm, repetition=turn, seconds=1.0))
            for n in range(5):
                ms = ttft * (1 + 0.001 * n)
                found.records.append(Record(
                    arm=arm, repetition=turn, stage="all", session=f"s{n}", step=0, intended=float(n), sent=float(n),
                    ended=n + ms / 1000, ttft_ms=ms, latency_ms=ms, status="ok", prompt_tokens=100, output_tokens=10,
                    itl_ms=[5.0, 5.0],
                ))  # fmt: skip
    return found


def rows(firsts: dict[str, float]) -> dict[tuple[str, str, str], tuple[str, str]]:
    found = tables.rows_of("random", result(firsts))
    return {(row.ours, row.theirs, row.metric): (f"{row.ratio.value:.2f}", row.verdict.strip("*")) for row in found}


def test_ours_over_theirs_whatever_order_the_arms_had() -> None:
    found = rows({"gpu-cache": 100.0, "cache": 50.0, "lmcache": 80.0})
    assert found["cache", "gpu-cache", "TTFT mean"] == ("0.50", "wins")
    assert found["cache", "lmcache", "TTFT mean"] == ("0.63", "wins")
    assert not [key for key in found if key[0] == "lmcache" or key[1] == "cache"]
    assert found["cache", "gpu-cache", "ITL p99"] == ("1.00", "ties")


def test_what_is_slower_is_said_to_lose() -> None:
    assert rows({"gpu-cache": 50.0, "cache": 100.0})["cache", "gpu-cache", "TTFT mean"] == ("2.00", "loses")
    assert rows({"cache": 100.0, "lmcache": 50.0})["cache", "lmcache", "TTFT mean"] == ("2.00", "loses")


def test_a_page_is_rewritten_between_its_marks_only(tmp_path: Path) -> None:
    results.write(result({"gpu-cache": 100.0, "cache": 50.0}), tmp_path / "runs")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures: runs -->\nold\n<!-- end of figures -->\nafter\n")
    assert tables.rewrite(page)
    text = page.read_text()
    assert text.startswith("before\n<!-- figures: runs -->\n")
    assert text.endswith("<!-- end of figures -->\nafter\n")
    assert "old" not in text
    assert "| random | cache / gpu-cache | TTFT mean | 0.500 |" in text
    assert "| random | cache | 3 | 15 | 0 | 50 |" in text
    assert "cpu abacus, cores 2" in text
    assert not tables.rewrite(page), "the same results give the same page"


def test_what_was_not_run_is_said_and_every_figure_has_its_folder(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- figures: runs -->\nold\n<!-- end of figures -->\n")
    assert tables.rewrite(page)
    assert page.read_text() == "<!-- figures: runs -->\nNot run yet.\n<!-- end of figures -->\n"
    blocks = list(tables.BLOCK.finditer((ROOT / "docs" / "benchmarks.md").read_text()))
    assert blocks
    for block in blocks:
        filled = tables.MISSING not in block[0]
        assert (ROOT / "docs" / block[2]).is_dir() == filled, f"run scripts/benchmark_tables.py: {block[2]}"


def test_the_simulation_stands_beside_the_real_run_with_its_error(tmp_path: Path) -> None:
    rows = [
        {"name": "hit rate", "simulated": 0.95, "measured": 1.0, "ratio": 0.95},
        {"name": "TTFT mean, s", "simulated": 1.28, "measured": 1.0, "ratio": 1.28},
    ]
    (tmp_path / "size-check.json").write_text(json.dumps(rows))
    text = "\n".join(tables.size_check(tmp_path / "size-check.json"))
    assert "| hit rate | 0.95 | 1 | -5.0% |" in text
    assert "farthest off is TTFT mean, s, by +28.0%" in text
    assert tables.size_check(tmp_path / "none.json") == []
    (tmp_path / "size-check.json").write_text("")  # a check that failed
    assert tables.size_check(tmp_path / "size-check.json") == []


def test_each_sweep_says_whose_sentence_it_is(tmp_path: Path) -> None:
    found = result({"gpu-cache": 100.0, "cache": 50.0})
    found.workload = "regimes"
    for record in found.records:
        record.group = "set 6000, length 300, reuse 90 %, users 1"
    results.write(found, tmp_path, "pd-regimes")
    text = tables.render(tmp_path)
    assert "| set 6000, length 300, reuse 90 %, users 1 | 100 ms | 50 ms |" in text
    assert "- pd-regimes: cache against the best fixed arm of each of 1 points: ahead at 1." in text
    assert "strictly better than gpu-cache" in text


def test_a_tiers_hit_stands_beside_its_miss_with_where_it_came_from() -> None:
    miss, hit = result({"": 100.0}), result({"": 40.0})
    for record in hit.records:
        record.tiers = {"gpu": 10, "redis": 80}
    ratio, where = tables.hits({"remote-miss": miss, "remote-hit": hit, "other-miss": miss})[:2]
    assert "hit / miss = 0.400" in ratio
    assert where == "- remote: 1500 tokens asked again; from where: gpu 150, redis 1200."
    assert tables.hits({"remote-miss": miss}) == []

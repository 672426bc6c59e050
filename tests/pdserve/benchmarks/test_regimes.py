"""The sweep's points and its judgement."""

from __future__ import annotations

import random

from pdserve.bench.record import Record
from pdserve.bench.regimes import grid, judge
from pdserve.bench.results import Result, Run
from pdserve.bench.size import work


def test_points_are_all_combinations_that_make_sense() -> None:
    found = grid.points([500, 8000], [1000, 3000], [0, 90], [1])
    assert len(found) == 6, "four with reuse; without, the working set says nothing"
    assert min(p.working_set for p in found) == 1000, "a working set holds one prompt at least"
    assert len(set(found)) == len(found)


def test_a_point_sends_what_its_name_says() -> None:
    point = grid.Point(6000, 2000, 50, 2)
    fill, asked = grid.plan(point, 5, 8, 0).stages
    assert len(list(fill.sessions)) == 3
    assert not fill.measured
    assert asked.concurrency == 2
    stages = work.of(grid.plan(point, 5, 8, 0), chunk_tokens=100).stages
    filled = {c for talk in stages[0][3] for c in talk.turns[0].chunks}
    for talk in stages[1][3]:
        chunks = talk.turns[0].chunks
        assert len([c for c in chunks if c in filled]) == 10
        assert len(chunks) == 20
    nothing = grid.plan(grid.Point(6000, 2000, 0, 1), 5, 8, 0)
    assert not list(nothing.stages[0].sessions)
    assert grid.plan(point, 5, 8, 0) == grid.plan(point, 5, 8, 0) != grid.plan(point, 5, 8, 1)


def swept(times: dict[str, dict[str, float]], repetitions: int = 4) -> Result:
    """TTFT middle by point and arm."""
    rng = random.Random(1)
    result = Result(workload="regimes", command="", seed=0, timeout=60)
    for repetition in range(1, repetitions + 1):
        for arm in next(iter(times.values())):
            facts = {"decisions": {point: {"load: faster": 3} for point in times}} if arm == "cache" else {}
            result.runs.append(Run(arm=arm, repetition=repetition, seconds=1, facts=facts))
            for point, by_arm in times.items():
                for n in range(10):
                    value = by_arm[arm] * rng.lognormvariate(0, 0.05)
                    result.records.append(
                        Record(arm=arm, repetition=repetition, stage=point, group=point, session=f"s{n}", step=0, intended=n,
                               ended=n + 1, ttft_ms=value, latency_ms=value)
                    )  # fmt: skip
    return result


def test_the_adaptive_arm_is_judged_against_the_best_fixed_one_of_each_point() -> None:
    result = swept({
        "small": {"gpu-cache": 100, "cache-always": 150, "cache": 101},
        "large": {"gpu-cache": 900, "cache-always": 200, "cache": 150},
        "odd": {"gpu-cache": 100, "cache-always": 200, "cache": 160},
    })  # fmt: skip
    judged = {j.point: j for j in judge.judge(result, "cache")}
    assert [(j.best, j.verdict) for j in judged.values()] == [
        ("gpu-cache", "level"),
        ("cache-always", "ahead"),
        ("gpu-cache", "behind"),
    ]
    assert judged["small"].decided == "load: faster 12"
    said = judge.sentences(result, "cache", list(judged.values()))
    assert said[0] == "cache against the best fixed arm of each of 3 points: ahead at 1, level at 1, behind at 1."
    assert said[1].startswith("Behind at odd: 1.")
    head, rows = judge.table(result, list(judged.values()))
    assert head[0] == "point"
    assert len(rows) == 3
    assert all(len(row) == len(head) for row in rows)


def test_over_the_mix_no_point_drowns_the_others() -> None:
    """Each fixed arm wins one point by far; the adaptive one equals the best at both, and is better than either over the two."""
    result = swept({
        "short": {"gpu-cache": 10, "cache-always": 40, "cache": 10},
        "long": {"gpu-cache": 4000, "cache-always": 1000, "cache": 1000},
    })  # fmt: skip
    ratios = dict(judge.overall(result, "cache"))
    assert all(r.differs and r.value < 0.5 for r in ratios.values())
    said = judge.sentences(result, "cache", judge.judge(result, "cache"))
    assert sum("strictly better than" in s for s in said) == 2


def test_which_arm_is_judged() -> None:
    assert judge.adaptive_of(["gpu-cache", "cache"]) == "cache"
    assert judge.adaptive_of(["cache", "pd+cache", "pd+adaptive"]) == "pd+adaptive"
    assert judge.adaptive_of(["gpu-cache", "pd"]) == ""


def test_one_turn_is_too_little() -> None:
    result = swept({"a": {"gpu-cache": 100, "cache": 10}}, repetitions=1)
    assert [j.verdict for j in judge.judge(result, "cache")] == ["too little to say"]

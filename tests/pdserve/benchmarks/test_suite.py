"""Several workloads against arms that are all up, in rounds, within a budget; with the fake engine."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from pdserve.bench import results, suite
from pdserve.bench.suite import Load

NAME = f"bench-suite-{os.getpid()}"
FAKE = """
name: {name}
model: {model}
engine: {{device: cpu, kind: fake, max_model_len: 100000}}
both: [{{port: 24590}}]
cache: {{size: 64MiB}}
"""


def words(load: Load, base: Path, out: Path) -> list[str]:
    common = [
        "--arms",
        "gpu-cache,cache",
        "--topology",
        str(base),
        "--settle",
        "0",
        "--max-client-overhead",
        "0",
        "--quiet",
    ]
    return [*load.words.split(), *common, "--scale", "0.01", "--out", str(out), "--name", load.name]


@pytest.fixture
def base(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    monkeypatch.setenv("PDSERVE_RUN_DIR", str(tmp_path_factory.mktemp("r")))  # a socket's path is short
    file = tmp_path / "base.yaml"
    file.write_text(FAKE.format(name=NAME, model=model))
    return file


def test_rounds_of_several_workloads_over_arms_that_are_up(base: Path, tmp_path: Path) -> None:
    said: list[str] = []
    loads = (
        Load("few", "random --num-prompts 4", 0.0, rounds=2),
        Load("one-arm", "random --num-prompts 3", 0.0, rounds=1, arms=("cache",)),
        Load("late", "random --num-prompts 1", 0.0, rounds=1, since=2, arms=("cache",)),
        Load("too-long", "random --num-prompts 2", 10**6),
    )
    todo = {load.name: suite.parsed(words(load, base, tmp_path / "out")) for load in loads}
    points = Load("points", "regimes --working-sets 60 --lengths 30 --reuse 0,90 --users 1 --requests 2", 0.0, rounds=1)
    common = ["--arms", "gpu-cache,cache", "--topology", str(base), "--settle", "0", "--quiet"]
    todo["points"] = suite.parsed([*points.words.split(), *common, "--out", str(tmp_path / "out"), "--name", "points"])
    ended = suite.run((*loads, points), todo, 600, 60, said.append, about=["Two arms."])
    assert ended == "to its end"
    few, single, late = (results.read(tmp_path / "out" / f"{name}.json") for name in ("few", "one-arm", "late"))
    assert [(run.arm, run.repetition) for run in few.runs] == [
        ("gpu-cache", 1),
        ("cache", 1),
        ("cache", 2),
        ("gpu-cache", 2),
    ]
    assert {len(few.of(run.arm, run.repetition)) for run in few.runs} == {4}
    assert [(run.arm, run.repetition) for run in single.runs] == [("cache", 1)]
    assert [(run.arm, run.repetition) for run in late.runs] == [("cache", 2)]
    assert {suite.HOW, "Two arms."} <= set(few.notes)
    swept = results.read(tmp_path / "out" / "points.json")
    assert [(run.arm, list(run.facts["decisions"])) for run in swept.runs] == [
        (arm, ["set 30, length 30, reuse 0 %, users 1", "set 60, length 30, reuse 90 %, users 1"])
        for arm in ("gpu-cache", "cache")
    ]
    assert {len(swept.of(arm)) for arm in swept.arms} == {2 + 2 + 2}, "two documents once, two requests at each point"
    assert not (tmp_path / "out" / "too-long.json").exists()
    assert sum(line.startswith("left out: too-long") for line in said) == 3
    assert running() == []


def test_a_budget_that_is_spent_while_engines_start_leaves_nothing_behind(base: Path, tmp_path: Path) -> None:
    load = Load("few", "random --num-prompts 4", 0.0)
    todo = {"few": suite.parsed(words(load, base, tmp_path / "out"))}
    ended = suite.run((load,), todo, 1, 0, lambda text: None)
    assert ended.startswith("time was up")
    assert not (tmp_path / "out").exists()
    assert running() == []


def running() -> list[str]:
    """Processes of the arms: launchers, daemons, and what they started, which has the arm's folder in its words."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if NAME in line and process.pid != os.getpid():
            found.append(line)
    return found

"""`pdserve topology`: files without a deployment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdserve import __main__ as command
from pdserve import topology

GOOD = """
name: good
model: Qwen/Qwen3-8B
both: [{port: 8300}]
cache: {size: 1GiB, tiers: ["redis://me:hunter2@h/0"]}
"""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(GOOD)
    bad.write_text(GOOD.replace("port: 8300", "prot: 8300"))
    return {"good": str(good), "bad": str(bad)}


def test_check(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["topology", "check", files["good"], "local-cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{files['good']}: ok", "local-cpu: ok"]
    assert command.main(["topology", "check", files["good"], files["bad"], "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert [f["ok"] for f in found] == [True, False]
    assert "Did you mean 'port'?" in found[1]["problem"]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["topology", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in topology.shipped_topologies())
    assert all(len(line) <= 80 for line in out.splitlines())
    assert command.main(["topology", "list", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == set(topology.shipped_topologies())


def test_show_has_defaults_and_no_password(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["topology", "show", files["good"], "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["cache"]["chunk_tokens"] == 256
    assert shown["proxy"]["port"] == 8000
    assert command.main(["topology", "show", files["good"]]) == 0
    assert "hunter2" not in f"{shown} {capsys.readouterr().out}"


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["topology", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "pdserve topology"

"""What is handed to Prometheus and Grafana: that they can load it, and that it asks for what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Histogram

from pdserve.metrics import reference
from pdserve.metrics.metric import PREFIX
from pdserve.metrics.reference import VLLM

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus"
NAME = re.compile(r"\b(?:pdserve_\w+|(?:pdserve|vllm):[\w:]+)")
CATALOGUE = {PREFIX + name: metric for _, table, _ in reference.TABLES for name, metric in table.items()}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="there is no promtool here (Debian package prometheus)"
)


def promtool(*words: str) -> str:
    done = subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=120, check=False, cwd=RULES)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def recorded() -> dict[str, str]:
    groups = yaml.safe_load((RULES / "recording.yaml").read_text())["groups"]
    return {rule["record"]: rule["expr"] for group in groups for rule in group["rules"]}


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load((RULES / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def panels() -> Iterator[dict[str, Any]]:
    board = json.loads((ROOT / "deploy" / "grafana" / "pdserve.json").read_text())
    yield from (panel for panel in board["panels"] if panel["type"] != "row")


def known() -> set[str]:
    found = set(VLLM) | set(recorded())
    for name, metric in CATALOGUE.items():
        found |= {name + suffix for suffix in ("_bucket", "_count", "_sum")} if metric.kind is Histogram else {name}
    return found


@needs_promtool
def test_rules_are_ones_that_prometheus_loads() -> None:
    promtool("check", "rules", "recording.yaml", "alerts.yaml")
    promtool("check", "config", "prometheus.yml")


@needs_promtool
def test_rules_do_what_they_say() -> None:
    promtool("test", "rules", str(ROOT / "tests" / "deploy" / "prometheus" / "rules_test.yaml"))


@pytest.mark.parametrize("name", [*recorded(), *alerts()])
def test_rules_ask_for_what_there_is(name: str) -> None:
    text = recorded().get(name) or alerts()[name]["expr"]
    asked = set(NAME.findall(text))
    assert asked | ({"up"} & set(re.findall(r"\bup\b", text)))
    assert asked <= known()


def test_targets_are_bounds_of_buckets() -> None:
    """A `le` that is no bucket's matches nothing, and the rule would be silent for ever."""
    found = re.findall(r'(pdserve_\w+)_bucket\{le="([\d.]+)"\}', "\n".join(recorded().values()))
    assert found
    for name, bound in found:
        assert bound in [str(float(b)) for b in CATALOGUE[name].buckets]


@pytest.mark.parametrize("name", alerts())
def test_alerts_say_what_and_what_to_do(name: str) -> None:
    alert = alerts()[name]
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert set(alert["annotations"]) == {"summary", "action"}
    named = set(NAME.findall(" ".join(alert["annotations"].values())))
    assert named <= known() | set(CATALOGUE)  # a histogram is named as a whole


def test_the_board_asks_for_what_there_is() -> None:
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    assert len(queries) > 30
    for query in queries:
        asked = set(NAME.findall(query))
        assert asked, query
        assert asked <= known(), query


def test_the_boards_selectors_use_labels_that_there_are() -> None:
    for panel in panels():
        for target in panel["targets"]:
            for name, selector in re.findall(r"(pdserve_\w+?)(?:_bucket)?\{([^}]*)\}", target["expr"]):
                labels = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", selector)) - {"job"}
                assert labels <= set(CATALOGUE[name].labels), target["expr"]


def test_the_board_is_laid_out() -> None:
    board = json.loads((ROOT / "deploy" / "grafana" / "pdserve.json").read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not mine & cells, panel["title"]
        assert max(x for x, _ in mine) < 24
        cells |= mine
    for panel in panels():
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"


@needs_promtool
def test_prometheus_can_parse_the_boards_queries(tmp_path: Path) -> None:
    """As rules, with Grafana's variables filled in."""
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    filled = [query.replace("$__rate_interval", "1m").replace("$job", ".*") for query in queries]
    rules = [{"record": f"test:query_{i}", "expr": query} for i, query in enumerate(filled)]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    promtool("check", "rules", "--lint=none", str(file))

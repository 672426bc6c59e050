from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pdserve.metrics import reference
from pdserve.metrics.metric import PREFIX, build

ROOT = Path(__file__).resolve().parents[2]
ALL = {name: metric for _, table, _ in reference.TABLES for name, metric in table.items()}
# What a label may be called: each of these takes its values from a closed set, never from a client.
LABELS = {
    "class", "endpoint", "route", "status", "instance", "role", "leg", "reason", "decision", "how", "tier", "result", "kind",
    "direction", "op", "outcome", "peer", "target", "transport", "engine", "cache",
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_every_metric_says_what_it_is_and_what_to_do(name: str) -> None:
    metric = ALL[name]
    assert metric.unit, f"{name} has no unit (Metric(..., unit=...))"
    assert metric.act, f"{name} does not say what to do when it moves (Metric(..., act=...))"
    assert metric.help
    assert not metric.help.endswith(".")
    assert set(metric.labels) <= LABELS
    assert (metric.kind is Histogram) == bool(metric.buckets)


@pytest.mark.parametrize("name", ALL)
def test_names_are_as_prometheus_wants_them(name: str) -> None:
    kind = ALL[name].kind
    assert name.endswith("_total") == (kind is Counter)
    if kind is Histogram:
        assert name.endswith("_seconds")
    if kind is Gauge:
        assert not name.endswith(("_count", "_sum", "_bucket"))


def test_no_name_is_used_twice() -> None:
    assert len(ALL) == sum(len(table) for _, table, _ in reference.TABLES)


def exposed() -> str:
    registry = CollectorRegistry()
    for _, table, _ in reference.TABLES:
        for name, made in build(table, registry).items():
            child = made.labels(*["x"] * len(table[name].labels)) if table[name].labels else made
            child.observe(1) if isinstance(made, Histogram) else child.inc()
    return generate_latest(registry).decode()


def test_all_of_it_can_be_read_back() -> None:
    families = {family.name for family in text_string_to_metric_families(exposed())}
    wanted = {(PREFIX + name).removesuffix("_total") for name in ALL}
    assert {name for name in families if not name.endswith("_created")} == wanted


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool here (Debian package prometheus)")
def test_promtool_finds_nothing_to_say() -> None:
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=exposed(), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_page_is_up_to_date() -> None:
    written = (ROOT / "docs" / "metrics.md").read_text()
    assert written == reference.page(), "docs/metrics.md is out of date: make docs-generate"


def test_the_page_has_a_row_for_each() -> None:
    page = reference.page()
    for name in ALL:
        assert page.count(f"| `pdserve_{name}` |") == 1

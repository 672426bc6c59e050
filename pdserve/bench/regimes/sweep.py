"""One arm sent every point of a sweep, and what its engines decided there. Same functions as bench.one has for a workload."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from typing import Any

import yaml

from pdserve import topology
from pdserve.bench import cli, facts, records_of, results, runner
from pdserve.bench.load import Options
from pdserve.bench.plan import Plan
from pdserve.bench.progress import Progress
from pdserve.bench.record import Record
from pdserve.bench.regimes import grid
from pdserve.bench.results import Result, Run
from pdserve.bench.runner import Server
from pdserve.errors import ConfigError, UpstreamError
from pdserve.openai_client import Client
from pdserve.target import Target

DECISIONS = "pdserve_engine_load_decisions_total"


def points(args: argparse.Namespace) -> list[grid.Point]:
    return grid.points(*(_numbers(args, name) for name in ("working_sets", "lengths", "reuse", "users")))


def plans(args: argparse.Namespace, server: Server) -> list[Plan]:
    """Each point's, if the server takes prompts of that length."""
    found = [grid.plan(point, args.requests, args.output_len, args.seed) for point in points(args)]
    for plan in found:
        runner.check_length(plan, server.max_len)
    return found


def most_users(args: argparse.Namespace, server: Server) -> int:
    return max(point.users for point in points(args))


def begin(args: argparse.Namespace, server: Server | None = None) -> Result:
    """The result's head."""
    return Result(
        workload="regimes", command=facts.command(), started=results.now(), seed=args.seed, timeout=args.timeout,
        parameters={"points": [p.name for p in points(args)], "requests": args.requests}, machine=facts.machine(),
        versions=facts.versions(),
    )  # fmt: skip


def measure(
    args: argparse.Namespace,
    server: Server,
    result: Result,
    arm: str,
    repetition: int,
    about: Mapping[str, Any],
) -> Run:
    """One turn of one arm, added to the result. `about` has its topology, which says where its engines are."""
    target = Target.of(topology.parse(yaml.safe_dump(about["topology"])))
    progress = Progress(sys.stderr, f"regimes {arm} #{repetition}", args.quiet)
    run = Run(arm=arm, repetition=repetition, seconds=0.0, facts={**about, "decisions": {}})
    options = Options(server.model, args.seed, timeout=args.timeout, settle=args.settle, extra=cli.extra_of(args))
    found: list[Record] = []
    for point, plan in zip(points(args), plans(args, server), strict=True):
        before = decisions(target)
        outcome = runner.run(plan, server, options, salt=f"/{repetition}", on_record=progress.on_record)
        records_of.fill_in(server, outcome.records)
        run.facts["decisions"][point.name] = {
            k: v - before.get(k, 0) for k, v in decisions(target).items() if v > before.get(k, 0)
        }
        run.seconds += outcome.seconds
        run.lag_p99_ms = max(run.lag_p99_ms, runner.lag_p99(outcome))
        for record in outcome.records:
            record.arm, record.repetition = arm, repetition
        found += outcome.records
    progress.end()
    result.runs.append(run)
    result.records += found
    return run


def decisions(target: Target) -> dict[str, int]:
    """What all engines decided so far, by decision and reason; nothing where they have no such metric."""
    found: dict[str, int] = {}
    for url in (u for urls in target.engines.values() for u in urls):
        try:
            with Client(url) as engine:
                metrics = engine.metrics()
        except UpstreamError:
            continue
        for name, value in metrics.items():
            if name.startswith(DECISIONS):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', name))
                key = f"{labels.get('decision', '?')}: {labels.get('reason', '?')}"
                found[key] = found.get(key, 0) + int(value)
    return found


def _numbers(args: argparse.Namespace, name: str) -> list[int]:
    text = getattr(args, name)
    try:
        found = [int(float(word)) for word in text.split(",") if word.strip()]
    except (ValueError, OverflowError):
        found = []
    if not found or min(found) < 0 or (name == "reuse" and max(found) > 100) or (name != "reuse" and min(found) < 1):
        raise ConfigError(f"--{name.replace('_', '-')}", f"{text!r} is not a list of numbers that make sense")
    return found

"""`pdserve bench regimes`: every arm in its turn is sent every point; what its engines decided is read from their metrics."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

from pdserve import topology
from pdserve.bench import arms, facts, records_of, results, runner, variants
from pdserve.bench.load import Options
from pdserve.bench.progress import Progress
from pdserve.bench.regimes import grid, judge
from pdserve.bench.results import Result, Run
from pdserve.bench.runner import Server
from pdserve.bench.show import print_table
from pdserve.errors import ConfigError, UpstreamError
from pdserve.openai_client import Client
from pdserve.target import Target

DECISIONS = "pdserve_engine_load_decisions_total"
EXAMPLES = """examples:
  pdserve bench regimes --topology local-cpu-both --working-sets 8000,60000 --lengths 1000,3000 --reuse 0,90 --users 1
  pdserve bench regimes --topology gpu.yaml --arms gpu-cache,cache-always,cache --repetitions 5 --out res
  pdserve bench regimes --topology local-cpu --arms cache,pd+cache,pd+adaptive --lengths 100,2500 --users 1,2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topology", default="local-cpu-both", help="what all arms are made from (default %(default)s)"
    )
    parser.add_argument(
        "--arms", default="gpu-cache,cache-always,cache", metavar="A,B,...",
        help="fixed arms and an adaptive one, `cache` or `pd+adaptive` (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--working-sets", default="8000,60000", metavar="N,...", help="tokens (default %(default)s)")
    parser.add_argument(
        "--lengths", default="1000,3000", metavar="N,...", help="tokens of a prompt (default %(default)s)"
    )
    parser.add_argument(
        "--reuse", default="0,50,90", metavar="N,...", help="percent of a prompt sent before (default %(default)s)"
    )
    parser.add_argument("--users", default="1,4", metavar="N,...", help="requests at a time (default %(default)s)")
    parser.add_argument("--requests", type=int, default=8, help="per point and turn (default %(default)s)")
    parser.add_argument("--output-len", type=int, default=8, help="tokens of an answer (default %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="turns of every arm (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed sends the same requests (default %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="of one request (default %(default)s)"
    )
    parser.add_argument(
        "--settle", type=float, default=1.0, metavar="S", help="pause between stages (default %(default)s)"
    )
    parser.add_argument("--keep-up", action="store_true", help="start every arm once and keep all up")
    parser.add_argument(
        "--budget", type=float, default=0.0, metavar="S", help="with --keep-up: begin no round that would end later"
    )
    parser.add_argument(
        "--first-port", type=int, default=0, metavar="N", help="the arms' ports: free ones from N on (default: any)"
    )
    parser.add_argument("--model", default="", help="model name to send (default: the first that the server lists)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write raw records and report.html there")
    parser.add_argument("--name", default="", help="file name of this result (default: regimes)")
    parser.add_argument("--json", action="store_true", help="print the judgement as data")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def main(args: argparse.Namespace) -> int:
    points = grid.points(*(_numbers(args, name) for name in ("working_sets", "lengths", "reuse", "users")))
    names = variants.parse(args.arms)
    if not judge.adaptive_of(names) or len(names) < 2:
        known = " or ".join(judge.ADAPTIVES)
        raise ConfigError("--arms", f"{args.arms!r} has no adaptive arm and a fixed one", f"Name {known}, and others.")
    base = arms.read_base(args.topology)
    names, notes = arms.usable(names, base)
    result = Result(
        workload="regimes", command=facts.command(), started=results.now(), seed=args.seed, timeout=args.timeout,
        parameters={"points": [p.name for p in points], "requests": args.requests}, machine=facts.machine(),
        versions=facts.versions(), notes=notes,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="pdserve-regimes-") as folder:
        turns = _kept_up if args.keep_up else _in_turns
        turns(args, names, base, Path(folder), points, result)
    return _finish(args, result)


def _in_turns(
    args: argparse.Namespace, names: list[str], base: arms.Raw, folder: Path, points: list[grid.Point], result: Result
) -> None:
    for repetition in range(1, args.repetitions + 1):
        for name in names:
            with arms.deployment(name, base, folder, args) as (server, raw):
                target = Target.of(topology.load(folder / f"{raw['name']}.yaml"))
                result.runs.append(_turn(args, server, target, name, repetition, points, result))


def _kept_up(
    args: argparse.Namespace, names: list[str], base: arms.Raw, folder: Path, points: list[grid.Point], result: Result
) -> None:
    """With --budget, rounds of all arms until the next one would not fit. Every other one goes the other way, so that no arm is always
    the first."""
    until = time.monotonic() + args.budget if args.budget else float("inf")
    with arms.up(names, base, folder, args) as (up, problems):
        result.notes += [*problems, "All arms were up, idle while it was not their turn."]
        for repetition in range(1, args.repetitions + 1):
            began = time.monotonic()
            for name, (server, raw) in list(up.items())[:: 1 if repetition % 2 else -1]:
                target = Target.of(topology.load(folder / f"{raw['name']}.yaml"))
                result.runs.append(_turn(args, server, target, name, repetition, points, result))
            if args.out:
                results.write(result, args.out, args.name)
            if time.monotonic() + 1.1 * (time.monotonic() - began) > until:
                result.notes.append(f"{repetition} of {args.repetitions} rounds: no time was left for more.")
                return


def _turn(
    args: argparse.Namespace,
    server: Server,
    target: Target,
    arm: str,
    repetition: int,
    points: list[grid.Point],
    result: Result,
) -> Run:
    progress = Progress(sys.stderr, f"regimes {arm} #{repetition}", args.quiet)
    run = Run(arm=arm, repetition=repetition, seconds=0.0, facts={"decisions": {}})
    for point in points:
        plan = grid.plan(point, args.requests, args.output_len, args.seed)
        runner.check_length(plan, server.max_len)
        before = decisions(target)
        options = Options(server.model, args.seed, timeout=args.timeout, settle=args.settle)
        outcome = runner.run(plan, server, options, salt=f"/{repetition}", on_record=progress.on_record)
        records_of.fill_in(server, outcome.records)
        run.facts["decisions"][point.name] = {
            k: v - before.get(k, 0) for k, v in decisions(target).items() if v > before.get(k, 0)
        }
        run.seconds += outcome.seconds
        for record in outcome.records:
            record.arm, record.repetition = arm, repetition
        result.records += outcome.records
    progress.end()
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


def _finish(args: argparse.Namespace, result: Result) -> int:
    adaptive = judge.adaptive_of(result.arms)
    judged = judge.judge(result, adaptive)
    said = judge.sentences(result, adaptive, judged)
    if args.out:
        from pdserve.bench.report import page

        results.write(result, args.out, args.name)
        page.write(args.out)
    if args.json:
        from pdserve import output

        rows = [
            {"point": j.point, "means": j.means, "best": j.best, "verdict": j.verdict, "decisions": j.decisions}
            for j in judged
        ]
        output.print_json({"points": rows, "sentences": said})
    else:
        print_table(*judge.table(result, judged))
        for line in said:
            print(line)
    return 1 if any(j.verdict == "behind" for j in judged) else 0


def _numbers(args: argparse.Namespace, name: str) -> list[int]:
    text = getattr(args, name)
    try:
        found = [int(float(word)) for word in text.split(",") if word.strip()]
    except ValueError:
        found = []
    if not found or min(found) < 0 or (name == "reuse" and max(found) > 100) or (name != "reuse" and min(found) < 1):
        raise ConfigError(f"--{name.replace('_', '-')}", f"{text!r} is not a list of numbers that make sense")
    return found

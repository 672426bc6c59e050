"""`pdserve bench regimes`: every arm in its turn is sent every point; what its engines decided is read from their metrics."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from pdserve.bench import arms, cli, compare, results, variants
from pdserve.bench.regimes import judge, sweep
from pdserve.bench.results import Result
from pdserve.bench.show import print_table
from pdserve.errors import ConfigError

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
    parser.add_argument("--extra-body", default="{}", metavar="JSON", help="goes into every request's body")
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
    sweep.points(args)
    cli.extra_of(args)
    results.check_folder(args.out)
    names = variants.parse(args.arms)
    if not judge.adaptive_of(names) or len(names) < 2:
        known = " or ".join(judge.ADAPTIVES)
        raise ConfigError("--arms", f"{args.arms!r} has no adaptive arm and a fixed one", f"Name {known}, and others.")
    if args.requests < 1 or args.repetitions < 1 or args.output_len < 1 or args.timeout <= 0:
        raise ConfigError("--requests, --repetitions, --output-len, --timeout", "must be positive")
    base = arms.read_base(args.topology)
    names, notes = arms.usable(names, base)
    if not judge.adaptive_of(names) or len(names) < 2:
        raise ConfigError("--arms", "no adaptive arm and a fixed one can be started here", " ".join(notes))
    result = sweep.begin(args)
    result.notes += [*notes, *arms.remarks(names, base)]
    with tempfile.TemporaryDirectory(prefix="pdserve-regimes-") as folder:
        turns = _kept_up if args.keep_up else _in_turns
        turns(args, names, base, Path(folder), result)
    return _finish(args, result)


def _in_turns(args: argparse.Namespace, names: list[str], base: arms.Raw, folder: Path, result: Result) -> None:
    for repetition in range(1, args.repetitions + 1):
        for name in names:
            with arms.deployment(name, base, folder, args) as (server, raw):
                sweep.measure(args, server, result, name, repetition, {"topology": raw})


def _kept_up(args: argparse.Namespace, names: list[str], base: arms.Raw, folder: Path, result: Result) -> None:
    """With --budget, rounds of all arms until the next one would not fit. Every other one goes the other way, so that no arm is always
    the first."""
    until = time.monotonic() + args.budget if args.budget else float("inf")
    with arms.up(names, base, folder, args) as (up, problems):
        result.notes += [*problems, "All arms were up, idle while it was not their turn."]
        for repetition in range(1, args.repetitions + 1):
            began = time.monotonic()
            for name, (server, raw) in list(up.items())[:: 1 if repetition % 2 else -1]:
                sweep.measure(args, server, result, name, repetition, {"topology": raw})
            if args.out:
                results.write(result, args.out, args.name)
            if time.monotonic() + 1.1 * (time.monotonic() - began) > until:
                result.notes.append(f"{repetition} of {args.repetitions} rounds: no time was left for more.")
                return


def _finish(args: argparse.Namespace, result: Result) -> int:
    result.notes += compare.idle_caches(result)
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

"""`pdserve doctor`: what this machine, a topology or a running deployment lacks, and the fix."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pdserve import output
from pdserve.errors import ConfigError

EXAMPLES = """examples:
  pdserve doctor                       this machine, and the deployment that runs, if one does
  pdserve doctor my.yaml               can this machine run it?
  pdserve doctor http://host:8000      a deployment anywhere: does the same prompt hit the second time?
  pdserve doctor http://host:8080      a cache daemon by its admin address: tiers, peers, failures
  pdserve doctor my.yaml --json | jq '.findings[] | select(.status == "fail")'
  pdserve doctor --prompts sent.jsonl  what keeps these prompts from sharing a prefix

exit codes: 0 nothing to fix, 4 warnings, 1 something fails, 2 no such topology, 3 nothing answers at that URL
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "a YAML file or shipped name, a running deployment's name, or its URL (default: what runs)"
    parser.add_argument("target", nargs="?", metavar="TOPOLOGY|URL|NAME", help=what)
    parser.add_argument("--json", action="store_true", help="all findings with their facts, for programs")
    parser.add_argument("--quiet", action="store_true", help="only what is to be fixed")
    parser.add_argument("--host", default="", metavar="NAME", help="which part of a topology over several hosts")
    parser.add_argument("--only", action="append", default=[], metavar="CHECK", help="this check alone (repeatable)")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help="also look at requests, one JSON body a line: where their beginnings part, and why",
    )


def main(args: argparse.Namespace) -> int:
    from pdserve.doctor import registry, report, runner, subject
    from pdserve.doctor.finding import exit_code

    checks = [check for check in registry.CHECKS if not args.only or check.name in args.only]
    unknown = sorted(set(args.only) - {check.name for check in registry.CHECKS})
    if unknown:
        known = ", ".join(check.name for check in registry.CHECKS)
        raise ConfigError("--only", f"{unknown[0]!r} is no check", f"Known: {known}.")
    if args.prompts is not None and not args.prompts.is_file():
        raise ConfigError("--prompts", f"{args.prompts} is not a file", "Give a file with one request body a line.")
    examined = subject.find(args.target, args.prompts, args.host)
    with output.steps(total=len(checks), stream=sys.stderr) as progress:
        findings = runner.run(checks, examined, lambda doing, done: progress.step(doing[:40], done))
    if args.json:
        output.print_json(report.as_json(examined.title(), findings))
    else:
        report.show(examined.title(), findings, quiet=args.quiet)
    return exit_code(findings)

"""`pdserve stop`: ends a deployment whether its supervisor is well, stuck or gone."""

from __future__ import annotations

import argparse
import sys

from pdserve import output
from pdserve.cli_status import find, is_up
from pdserve.deploy import cleanup, state
from pdserve.errors import ConfigError

EXAMPLES = """examples:
  pdserve stop                 the one that runs
  pdserve stop local-cpu
  pdserve stop --all           every deployment of this user
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", nargs="?", metavar="NAME|TOPOLOGY.yaml", help="which (default: the only one that runs)"
    )
    parser.add_argument("--all", action="store_true", help="every deployment of this user")
    parser.add_argument("--json", action="store_true", help="what was done, for programs")


def main(args: argparse.Namespace) -> int:
    stopped = []
    for deployment in _chosen(args):
        with output.steps() as progress:  # engines get up to 25 s to end by themselves
            progress.step(f"stopping {deployment.name}")
            done = cleanup.stop(deployment)
        stopped.append({"name": deployment.name, "done": done})
        if not args.json:
            print(f"{deployment.name}: {'; '.join(done) if done else 'was not running'}", flush=True)
    return output.print_json(stopped) if args.json else 0


def _chosen(args: argparse.Namespace) -> list[state.Deployment]:
    if args.target:
        found = find(args.target)
        if found is None:
            print(f"{args.target}: was not running", file=sys.stderr)
        return [found] if found else []
    up = [deployment for deployment in state.read_all() if is_up(deployment)]
    if len(up) > 1 and not args.all:
        names = ", ".join(deployment.name for deployment in up)
        raise ConfigError("target", f"several deployments run: {names}", "Name one, or pass --all.")
    if not up:
        print("Nothing is running.", file=sys.stderr if args.json else sys.stdout)
    return up

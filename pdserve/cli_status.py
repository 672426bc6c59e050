"""`pdserve status`: what the supervisor recorded, checked against what is there now."""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from pdserve import env, topology
from pdserve.deploy import state
from pdserve.deploy.backends.local import is_running
from pdserve.deploy.watch import duration
from pdserve.errors import PdserveError

EXAMPLES = """examples:
  pdserve status                  everything that runs
  pdserve status local-cpu        one deployment; exit code 1 when it is not ready
  pdserve status --json
"""
PROBE_SECONDS = 3.0
PIPE_WIDTH = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", metavar="NAME|TOPOLOGY.yaml", help="only this one (default: all that run)")
    parser.add_argument("--json", action="store_true", help="for programs")


def main(args: argparse.Namespace) -> int:
    if args.target:
        found = find(args.target)
        deployments = [found] if found else []
        if not found:
            print(f"{args.target} is not running and never was", file=sys.stderr)
    else:
        deployments = [deployment for deployment in state.read_all() if is_up(deployment)]
    facts = [_probed(deployment) for deployment in deployments]
    if args.json:
        print(json.dumps(facts, indent=1))
    elif facts:
        for fact in facts:
            _print(fact)
    elif not args.target:
        print("Nothing is running.")
    ready = all(fact["state"] == "ready" for fact in facts)
    return 0 if ready and (facts or not args.target) else 1


def find(target: str) -> state.Deployment | None:
    """By name, or by the file that names it."""
    if Path(target).name == target and (found := state.read(env.run_root() / target)):
        return found
    try:
        name = topology.load(target).name
    except PdserveError:
        if Path(target).exists():
            raise
        return None
    return state.read(env.run_root() / name)


def is_up(deployment: state.Deployment) -> bool:
    """Its supervisor lives, or died and left processes."""
    return deployment.supervisor_alive() or any(r.pid and is_running(r.pid, r.created) for r in deployment.processes)


def _probed(deployment: state.Deployment) -> dict[str, Any]:
    """The record as plain data, with what is true now: a dead pid is not `ready`, whatever the file says."""
    facts: dict[str, Any] = msgspec.to_builtins(deployment)
    lost = not deployment.supervisor_alive() and deployment.state not in ("stopped", "failed")
    if lost:
        facts["state"] = "lost"
        facts["error"] = f"its supervisor (pid {deployment.pid}) is gone; clean up: pdserve stop {deployment.name}"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda r: _answers(r.ready_url) if r.pid else False, deployment.processes))
    for record, answers_now in zip(facts["processes"], answers, strict=True):
        record["answers"] = answers_now
        if record["pid"] and not is_running(record["pid"], record["created"]):
            record["state"], record["detail"] = "stopped" if lost else record["state"], "its process is gone"
        elif record["state"] == "ready" and not answers_now:
            record["state"], record["detail"] = "unhealthy", f"{record['ready_url']} does not answer"
    if facts["state"] == "ready" and any(record["state"] != "ready" for record in facts["processes"]):
        facts["state"] = "degraded"
    return facts


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=PROBE_SECONDS) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _print(facts: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:  # a pipe has no width to fit into
        console.width = PIPE_WIDTH
    now = time.time()
    console.print(
        f"{facts['name']}: {facts['state']}, {facts['url']} serves {facts['model']}, run directory {facts['run_dir']}"
    )
    if facts["error"]:
        console.print(f"  {facts['error'].splitlines()[0]}", markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("process", "role", "pid", "url", "state", "restarts", "since", ""):
        table.add_column(column, no_wrap=bool(column))  # only the last, which explains, may give way
    for record in facts["processes"]:
        since = f"{duration(now - record['since'])} ago"
        cells = [record["name"], record["role"], str(record["pid"] or "-"), record["url"], record["state"]]
        table.add_row(*cells, str(record["restarts"]), since, record["detail"])
    console.print(table, markup=False)

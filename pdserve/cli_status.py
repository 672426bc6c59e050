"""`pdserve status`: what the supervisor recorded, checked against what is there now."""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from pdserve import env, output, topology
from pdserve.deploy import others, probe, state
from pdserve.deploy.backends.local import is_running
from pdserve.deploy.watch import duration
from pdserve.errors import NotRunning, PdserveError

EXAMPLES = """examples:
  pdserve status                  everything that runs
  pdserve status local-cpu        one deployment; exit code 1 when it is not ready, 3 when there is none
  pdserve status --json           with several hosts: the others' processes under `hosts`
"""
PROBE_SECONDS = 3.0


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
        output.print_json(facts)
    elif facts:
        for fact in facts:
            _print(fact)
    elif not args.target:
        print("Nothing is running.")
    if args.target and not facts:
        return NotRunning.exit_code
    return 0 if all(fact["state"] == "ready" for fact in facts) else 1


def find(target: str) -> state.Deployment | None:
    """By name, or by the file that names it."""
    if Path(target).name == target and (found := state.read(env.run_root() / target) or _part_of(target)):
        return found
    try:
        name = topology.load(target).name
    except PdserveError:
        if Path(target).exists():
            raise
        return None
    return state.read(env.run_root() / name) or _part_of(name)


def _part_of(name: str) -> state.Deployment | None:
    """This host's part of a deployment over several; None when there is none, or more than one here."""
    parts = [found for path in env.run_root().glob(f"{name}@*") if (found := state.read(path))]
    return parts[0] if len(parts) == 1 else None


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
        answers = list(
            pool.map(lambda r: probe.answers(r.ready_url, PROBE_SECONDS) if r.pid else False, deployment.processes)
        )
    for record, answers_now in zip(facts["processes"], answers, strict=True):
        record["answers"] = answers_now
        if deployment.backend != "local":
            continue  # other machines' pids and loopback: what the supervisor says is what there is
        if record["pid"] and not is_running(record["pid"], record["created"]):
            record["state"], record["detail"] = "stopped" if lost else record["state"], "its process is gone"
        elif record["state"] == "ready" and not answers_now:
            record["state"], record["detail"] = "unhealthy", f"{record['ready_url']} does not answer"
    if facts["state"] == "ready" and any(record["state"] != "ready" for record in facts["processes"]):
        facts["state"] = "degraded"
    del facts["elsewhere"]
    facts["hosts"] = others.states(deployment)
    if facts["state"] == "ready" and any(other["state"] != "ready" for other in facts["hosts"]):
        facts["state"] = "degraded"
    return facts


def _print(facts: dict[str, Any]) -> None:
    now = time.time()
    print(f"{facts['name']}: {facts['state']}, {facts['url']} serves {facts['model']}")
    print(f"run directory {facts['run_dir']}")
    if facts["error"]:
        print(facts["error"].splitlines()[0])
    _print_processes(facts["processes"], now)
    for other in facts["hosts"]:
        print(f"\non host {other['host']}: {other['state']} (told by {other['told_by']})")
        if other["error"]:
            print(other["error"].splitlines()[0])
        _print_processes(other["processes"], now)


def _print_processes(records: list[dict[str, Any]], now: float) -> None:
    rows = []
    for record in records:
        address = record["url"].removeprefix("http://")
        since = duration(now - record["since"])
        rows.append((record["name"], record["pid"] or "-", address, record["state"], record["restarts"], since))
    output.table(("process", "pid", "address", "state", "restarts", "for"), rows, right=("pid", "restarts", "for"))
    for record in records:
        if record["detail"]:
            print(f"{record['name']}: {record['detail']}")

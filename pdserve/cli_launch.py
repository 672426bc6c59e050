"""`pdserve launch`: load, plan, check, then supervise here or in the background."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import msgspec
import yaml

from pdserve import log, topology
from pdserve.deploy import cleanup, preflight, state
from pdserve.deploy.backends.base import Backend
from pdserve.deploy.backends.local import LocalBackend
from pdserve.deploy.plan import Plan, make, make_all
from pdserve.deploy.supervise import Supervisor
from pdserve.deploy.watch import Watch
from pdserve.errors import ConfigError, StartError

EXAMPLES = """examples:
  pdserve launch local-cpu               a topology shipped with pdserve; Ctrl-C stops everything
  pdserve launch my.yaml --dry-run       what would be started, word for word
  pdserve launch my.yaml --host a        only what runs on host a; the same on every host of the topology
  pdserve launch my.yaml --backend ray   every host of the topology, as nodes of a Ray cluster
  pdserve launch my.yaml --detach        returns when it is ready; then: pdserve status, pdserve stop
"""
_TICK = 0.5
_LOCK_SECONDS = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shipped = ", ".join(topology.shipped_topologies())
    parser.add_argument("topology", help=f"a YAML file, or one of: {shipped}")
    parser.add_argument("--dry-run", action="store_true", help="print the exact process list and start nothing")
    parser.add_argument(
        "--json", action="store_true", help="the process list (--dry-run) or the ready deployment as JSON"
    )
    parser.add_argument("--detach", action="store_true", help="run in the background; returns when ready")
    parser.add_argument("--host", default="", metavar="NAME", help="start the part of this one of the topology's hosts")
    parser.add_argument(
        "--backend", choices=("local", "ray"), default="local",
        help="where processes run: on this machine, or on the hosts of a Ray cluster, all started from here",
    )  # fmt: skip
    log.add_argument(parser)
    parser.add_argument("--force", action="store_true", help="start although the estimate of memory says no")
    parser.add_argument("--supervise", action="store_true", help=argparse.SUPPRESS)  # the background half of --detach


def main(args: argparse.Namespace) -> int:
    if args.log_format:
        os.environ["PDSERVE_LOG_FORMAT"] = args.log_format  # for every process that is started from here
    cores = sorted(os.sched_getaffinity(0))
    top = _load(args.topology)
    plan = _plan_everywhere(top, cores, args) if args.backend == "ray" else make(top, cores, host=args.host)
    if args.dry_run:
        _print_plan(plan, args.json)
        return 0
    lock = _lock(plan)
    if not args.supervise:
        _clean_leftovers(plan)
        if args.backend == "local":
            preflight.check(plan, args.force)
        else:  # what the hosts have cannot be looked at from here
            preflight.check_peers(plan)
            preflight.check_model(plan)
        _prepare_run_dir(plan)
    if args.detach:
        lock.close()  # the background process takes it
        return _detached(plan, args)
    with lock:
        return _supervise(plan, args)


def _plan_everywhere(top: topology.Topology, cores: list[int], args: argparse.Namespace) -> Plan:
    """Every host's part, to be started from here."""
    if args.host or not top.hosts:
        problem = "starts every host's part, and --host names one" if args.host else "needs hosts in the topology"
        raise ConfigError("--backend", f"ray {problem}", "Leave --host out, and list hosts: [{name: a, address: ...}].")
    return make_all(top, {host.name: cores for host in top.hosts})


def _load(name: str) -> topology.Topology:
    try:
        return topology.load(name)
    except ConfigError as error:
        if error.key:  # which file, for those who keep several
            raise ConfigError(f"{name}: {error.key}", error.problem, error.fix) from error
        raise


# --- before ------------------------------------------------------------------------------------------


def _lock(plan: Plan) -> IO[str]:
    lock = state.lock(plan.run_dir, _LOCK_SECONDS)
    if lock is None:
        running = state.read(plan.run_dir)
        by = f" (supervisor pid {running.pid})" if running else ""
        fix = f"Stop it: pdserve stop {plan.label}. Or give this one another name."
        raise ConfigError("name", f"{plan.label} is running already{by}", fix)
    return lock


def _clean_leftovers(plan: Plan) -> None:
    """Only after the lock is ours: nobody supervises what is found here."""
    old = state.read(plan.run_dir)
    for line in cleanup.sweep(old) if old else []:
        print(f"from an earlier run: {line}", file=sys.stderr)


def _prepare_run_dir(plan: Plan) -> None:
    logs = plan.run_dir / "logs"
    if logs.exists():  # the run before stays readable
        shutil.rmtree(plan.run_dir / "logs.previous", ignore_errors=True)
        logs.rename(plan.run_dir / "logs.previous")
    logs.mkdir(parents=True)
    (plan.run_dir / state.FILE).unlink(missing_ok=True)
    raw: dict[str, Any] = yaml.safe_load(Path(plan.topology.source).read_text())
    if plan.context.model.local and not plan.context.model.demo:
        raw["model"] = plan.context.model.source  # a relative path would mean another folder from here
    copy = plan.run_dir / "topology.yaml"
    copy.touch(0o600)  # it may hold passwords
    copy.write_text(yaml.safe_dump(raw, sort_keys=False))


def _print_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        facts = {"name": plan.label, "url": plan.url, "run_dir": plan.run_dir}
        shown = [asdict(p) | {"env": p.shown_env(), "hidden": sorted(p.hidden)} for p in plan.processes]
        print(json.dumps({**facts, "processes": shown}, indent=1, default=str))
        return
    print(f"# {plan.label}: {len(plan.processes)} processes, run directory {plan.run_dir}")
    for process in plan.processes:
        after = f", after {', '.join(process.depends)}" if process.depends else ""
        print(f"\n# {process.name}: ready when {process.ready_url} answers{after}; log {process.log}")
        print(process.shell())


# --- here --------------------------------------------------------------------------------------------


def _supervise(plan: Plan, args: argparse.Namespace) -> int:
    watch = Watch(sys.stderr)
    try:
        return asyncio.run(_run(plan, args, watch))
    finally:
        watch.close()


def _backend(plan: Plan, args: argparse.Namespace) -> Backend:
    if args.backend == "local":
        return LocalBackend()
    from pdserve.deploy.backends import ray

    return ray.for_topology(plan.topology)


async def _run(plan: Plan, args: argparse.Namespace, watch: Watch) -> int:
    told = False

    def show(deployment: state.Deployment) -> None:
        nonlocal told
        watch.show(deployment)
        if deployment.state == "ready" and not told:
            told = True
            _say_ready(deployment, args.json, "Ctrl-C stops it")

    backend = _backend(plan, args)
    supervisor = Supervisor(plan, backend, on_change=show)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, supervisor.stop)

    async def tick() -> None:
        with contextlib.suppress(OSError):  # the terminal is gone; SIGHUP tells the supervisor
            while True:
                watch.show(supervisor.deployment)
                await asyncio.sleep(_TICK)

    ticking = asyncio.create_task(tick())
    try:
        await supervisor.run()
    finally:
        ticking.cancel()
        if (close := getattr(backend, "close", None)) is not None:
            await asyncio.to_thread(close)
    return 0


def _say_ready(deployment: state.Deployment, as_json: bool, how_to_stop: str) -> None:
    if as_json:
        print(json.dumps(msgspec.to_builtins(deployment)), flush=True)
        return
    served = [record.name for record in deployment.processes]
    print(
        f"{deployment.name} is ready: {deployment.url} serves {deployment.model} ({', '.join(served)}); {how_to_stop}.",
        flush=True,
    )


# --- in the background -------------------------------------------------------------------------------


def _detached(plan: Plan, args: argparse.Namespace) -> int:
    command = [sys.executable, "-P", "-m", "pdserve", "launch", plan.topology.source, "--supervise"]
    command += ["--host", plan.host] if plan.host else []
    command += ["--backend", args.backend]
    log_file = plan.run_dir / "logs" / "supervisor.log"
    with log_file.open("ab") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
        )
    watch = Watch(sys.stderr)
    try:
        deployment = _until_ready(plan, child, watch)
    except KeyboardInterrupt:
        child.terminate()
        child.wait(timeout=cleanup.SUPERVISOR_SECONDS)
        raise
    finally:
        watch.close()
    if deployment is None:
        return _say_failure(plan, child, log_file)
    _say_ready(deployment, args.json, f"pdserve stop {deployment.name} stops it")
    return 0


def _until_ready(plan: Plan, child: subprocess.Popen[bytes], watch: Watch) -> state.Deployment | None:
    """Follows state.json. Ends: the supervisor has a deadline for everything that it waits for."""
    while child.poll() is None:
        deployment = state.read(plan.run_dir)
        if deployment is not None and deployment.pid == child.pid:
            watch.show(deployment)
            if deployment.state == "ready":
                return deployment
        time.sleep(_TICK / 2)
    return None


def _say_failure(plan: Plan, child: subprocess.Popen[bytes], log_file: Path) -> int:
    deployment = state.read(plan.run_dir)
    if deployment is not None and deployment.pid == child.pid and deployment.error:
        raise StartError(deployment.error)
    tail = log_file.read_text(errors="replace")[-2000:]
    raise StartError(f"the supervisor ended with code {child.returncode}; the end of {log_file}:\n{tail}")

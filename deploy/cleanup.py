"""Stopping a deployment from outside, whether its supervisor is well, stuck, or was killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from pdserve.deploy import leftovers, state
from pdserve.deploy.backends.local import end_session, kill_all, marked, session_members
from pdserve.deploy.supervise import STOP_ORDER

# Longer than the supervisor's own worst case (three groups in turn, each with its grace), so that it normally finishes.
SUPERVISOR_SECONDS = 90.0
GRACE_SECONDS = 10.0


def stop(deployment: state.Deployment, grace: float = GRACE_SECONDS) -> list[str]:
    """Ends everything that belongs to it; returns what it did, in words. Nothing to do is an empty list."""
    done = []
    if deployment.supervisor_alive():
        _send(deployment.pid, signal.SIGTERM)
        deadline = time.monotonic() + SUPERVISOR_SECONDS
        while deployment.supervisor_alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        if deployment.supervisor_alive():
            kill_all([deployment.pid])
            done.append(
                f"the supervisor (pid {deployment.pid}) did not end within {SUPERVISOR_SECONDS:g} s and was killed"
            )
        else:
            done.append("stopped")
    return done + sweep(deployment, grace)


def sweep(deployment: state.Deployment, grace: float = GRACE_SECONDS) -> list[str]:
    """What a supervisor that was killed left behind: processes, in the order of a normal stop, then files."""
    done: list[str] = []
    fresh = state.read(Path(deployment.run_dir)) or deployment
    if fresh.backend != "local":  # its pids are other machines', and what runs there ends with its launcher
        return done
    for roles in STOP_ORDER:
        group = [record for record in fresh.processes if record.role in roles and record.pid]
        leaders = {record.pid: record.created for record in group if record.pid}
        if members := _members(leaders):
            for pid in set(leaders) & set(members):
                _send(pid, signal.SIGTERM)
            _wait(leaders, grace)
            stuck = [pid for sid, created in leaders.items() for pid in end_session(sid, created, grace)]
            names = ", ".join(record.name for record in group)
            done.append(f"ended what was left of {names}" + (f" (pids {stuck} cannot be killed)" if stuck else ""))
    if strays := marked(fresh.run_dir):
        kill_all(strays)
        done.append(f"ended {len(strays)} more process(es) of this deployment")
    for path in (Path(p) for record in fresh.processes for p in record.leftovers):
        if path.exists():
            leftovers.remove(path)
            done.append(f"removed {path}")
    if done:
        _mark_stopped(fresh)
    return done


def _members(leaders: dict[int, float]) -> list[int]:
    return [pid for sid, created in leaders.items() for pid in session_members(sid, created)]


def _wait(leaders: dict[int, float], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while _members(leaders) and time.monotonic() < deadline:
        time.sleep(0.1)


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _mark_stopped(deployment: state.Deployment) -> None:
    deployment.state = "stopped"
    for record in deployment.processes:
        record.pid = None
        if record.state not in ("stopped", "failed"):
            record.state, record.since, record.detail = "stopped", time.time(), ""
    state.write(deployment)

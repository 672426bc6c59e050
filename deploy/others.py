"""The other hosts of a deployment, as seen from this one: what their supervisors say, else whether their processes answer.

Their word comes through this host's cache daemon, which asks its peers; a host whose daemon does not answer is probed.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from pdserve import env
from pdserve.deploy import probe
from pdserve.deploy.hosts import Elsewhere
from pdserve.deploy.state import Deployment

PROBE_SECONDS = 3.0
ASK_SECONDS = 6.0


def states(deployment: Deployment) -> list[dict[str, Any]]:
    """One entry for each other host: host, state, processes (as in state.json), told_by ("its daemon" or "probe")."""
    if not deployment.elsewhere:
        return []
    told = _told(deployment)
    expected = any(r.role == "cache" for r in deployment.processes)  # without a daemon here nobody can be asked
    by_host: dict[str, list[Elsewhere]] = {}
    for other in deployment.elsewhere:
        by_host.setdefault(other.host, []).append(other)
    found = []
    for host, processes in by_host.items():
        theirs = told.get(host)
        found.append(_said(host, theirs) if theirs is not None else _probed(host, processes, expected))
    return found


def _told(deployment: Deployment) -> dict[str, Deployment]:
    daemon = next((r for r in deployment.processes if r.role == "cache" and r.pid), None)
    if daemon is None:
        return {}
    request = urllib.request.Request(f"{daemon.url}/peers/states")
    if token := env.admin_token():
        request.add_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=ASK_SECONDS) as answer:
            told = json.load(answer)
    except (urllib.error.URLError, OSError, ValueError):
        return {}
    found = {}
    for host, text in told.items():
        try:
            found[host] = msgspec.convert(text, Deployment)
        except msgspec.ValidationError:
            continue  # another version's, or none: it is probed
    return found


def _said(host: str, theirs: Deployment) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.to_builtins(theirs)
    return {"host": host, "told_by": "its daemon", **{key: facts[key] for key in ("state", "error", "processes")}}


def _probed(host: str, processes: list[Elsewhere], expected: bool) -> dict[str, Any]:
    """`expected`: its daemon should have told, if there is one."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda p: probe.answers(p.ready_url, PROBE_SECONDS) if p.ready_url else None, processes)
        )
    records = [
        {
            "name": p.name,
            "role": p.role,
            "url": p.url,
            "pid": None,
            "restarts": 0,
            "since": time.time(),
            "state": "unknown" if answer is None else "ready" if answer else "unreachable",
            "detail": ""
            if answer
            else "its daemon says nothing of it"
            if answer is None
            else f"{p.ready_url} does not answer",
        }
        for p, answer in zip(processes, answers, strict=True)
    ]
    states = {r["state"] for r in records}
    silent = "degraded" if expected else "ready"
    state = "ready" if states == {"ready"} else silent if states == {"ready", "unknown"} else "unreachable"
    return {
        "host": host,
        "told_by": "probe",
        "state": state,
        "error": "",
        "processes": records,
    }

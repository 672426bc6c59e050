"""A deployment that runs: its processes, its cache daemon, its tiers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pdserve import env
from pdserve.deploy import state
from pdserve.doctor.finding import Finding, fail, ok, warn
from pdserve.doctor.subject import Subject
from pdserve.errors import UpstreamError
from pdserve.openai_client import Client, parse_metrics, total

PROCESSES, CACHE = "processes", "cache"
_SECONDS = 5.0


def processes(subject: Subject) -> Iterator[Finding]:
    if subject.deployment is not None:
        yield judge_processes(subject.deployment)


def judge_processes(deployment: state.Deployment) -> Finding:
    records = deployment.processes
    bad = [r for r in records if r.state != "ready"]
    if bad:
        found = ", ".join(f"{r.name} {r.state}" + (f" ({r.detail})" if r.detail else "") for r in bad)
        means = "What is not ready serves nobody; the others go on without it."
        return fail(PROCESSES, found, means, f"Read why: {bad[0].log}")
    restarted = [r for r in records if r.restarts]
    if restarted:
        found = ", ".join(f"{r.name} restarted {r.restarts} times" for r in restarted)
        means = "A process died and was started again; requests on it were retried or recomputed."
        return warn(PROCESSES, found, means, f"Read why: {restarted[0].log}")
    return ok(PROCESSES, f"{len(records)} ready, none restarted")


def cache(subject: Subject) -> Iterator[Finding]:
    if not subject.admin_url:
        return
    token = env.admin_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with Client(subject.admin_url) as admin:
            status = admin.request("GET", "/status", timeout=_SECONDS, headers=headers)
            metrics = admin.request("GET", "/metrics", timeout=_SECONDS, headers=headers)
    except UpstreamError as error:
        means = "Everything is computed: nothing is stored, nothing is hit, and prefill cannot hand over."
        yield fail(
            CACHE, str(error), means, "pdserve status; then the cache's log (logs/cache.log in the run directory)."
        )
        return
    if status.status_code != 200 or metrics.status_code != 200:
        means = "The daemon runs, but it does not tell how it is."
        yield warn(CACHE, f"HTTP {status.status_code} from {subject.admin_url}/status", means, _TOKEN_FIX)
        return
    facts = status.json()
    failures = total(parse_metrics(metrics.text), "pdserve_cache_digest_failures_total")
    yield judge_cache(facts, failures, expects_clients=not (subject.is_fake or subject.daemon))
    for name, tier in facts.get("tiers", {}).items():
        yield judge_tier(name, tier)
    for peer in facts.get("peers", {}).get("peers", []):
        yield judge_peer(peer)


_TOKEN_FIX = "Set PDSERVE_ADMIN_TOKEN to the token that the daemon was started with."


def judge_cache(facts: dict[str, Any], digest_failures: float, expects_clients: bool = True) -> Finding:
    used, capacity = facts.get("used_bytes", 0), facts.get("capacity_bytes", 0)
    text = f"{facts.get('chunks', 0)} chunks, {used / 2**30:.2f} of {capacity / 2**30:.2f} GiB"
    if digest_failures:
        means = "Chunks in memory or below it changed after they were stored. They were dropped and computed again."
        fix = "Once: note it. Repeatedly: test this machine's memory (memtester) and disk (pdserve cache scrub)."
        return warn(CACHE, f"{text}, {digest_failures:g} digest failures", means, fix)
    clients = facts.get("clients", [])
    if not clients and expects_clients:
        means = "No engine is connected to this daemon: nothing is stored and nothing is hit."
        return fail(
            CACHE, f"{text}, no clients", means, "Are the engines started with this daemon's --socket? See their logs."
        )
    return ok(CACHE, f"{text}, {len(clients)} clients")


def judge_tier(name: str, facts: dict[str, Any]) -> Finding:
    condition = str(facts.get("state", "ok"))
    label = f"{CACHE} {name}"
    if condition == "ok":
        used, capacity = facts.get("used_bytes", 0), facts.get("capacity_bytes", 0)
        of = f" of {capacity / 2**30:.2f}" if capacity else ""
        return ok(label, f"{facts.get('chunks', 0)} chunks, {used / 2**30:.2f}{of} GiB")
    means = "This tier is left alone for a while and tried again by itself; requests are served without it."
    return warn(label, condition, means, "Look at that server or disk; `pdserve cache status` shows when it is back.")


def judge_peer(facts: dict[str, Any]) -> Finding:
    name, error = facts.get("name") or facts["url"], facts.get("error", "")
    label = f"peer {name}"
    if facts["state"] == "up":
        return ok(label, f"up at {facts['url']}, {facts['chunks']} chunks there")
    text = f"{facts['state']}: {error}" if error else str(facts["state"])
    if any(word in error.lower() for word in ("secret", "hmac", "challenge", "proof", "authentic")):
        means = "The hosts do not prove the same secret to each other, so nothing is fetched from there or handed over to it."
        fix = f"Give {name} and this host the same PDSERVE_PEER_SECRET (or --peer-secret-file), then restart the daemon that was wrong."
        return fail(label, text, means, fix)
    means = "What only that host holds is computed again; it is tried again by itself."
    fix = f"Does its daemon run, and does the network let {facts['url']} through? On that host: pdserve doctor."
    return warn(label, text, means, fix)

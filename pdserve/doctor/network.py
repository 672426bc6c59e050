"""Ports: free, or taken by the very deployment that is examined. Clocks: do the hosts agree?"""

from __future__ import annotations

import email.utils
import http.client
import os
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pdserve.deploy import preflight
from pdserve.deploy.hosts import Elsewhere
from pdserve.deploy.preflight import Wanted
from pdserve.doctor.finding import Finding, fail, ok, skip, warn
from pdserve.doctor.subject import Subject
from pdserve.errors import UpstreamError
from pdserve.openai_client import Client

PORTS, CLOCK, HOSTS = "ports", "clocks", "host"
#: HTTP dates are whole seconds; more than this apart is not rounding
SKEW_SECONDS = 2.0
WRONG_SECONDS = 30.0
_ASK_SECONDS = 3.0


def ports(subject: Subject) -> Iterator[Finding]:
    if subject.topology is None:
        return
    wanted = preflight.wanted_ports(subject.topology)
    problems = {port.key: preflight.port_problem(port.host, port.port) for port in wanted}
    if subject.running is None:
        yield from judge_ports(wanted, problems)
        return
    ours = {record.pid for record in subject.deployment.processes} if subject.deployment else set()
    strangers = {port.key: stranger(port.port, ours) for port in wanted if problems[port.key] and ours}
    yield from judge_ports_in_use(wanted, problems, strangers)


def stranger(port: int, ours: set[int | None]) -> int | None:
    """Who listens there and is in no session of ours (each process of a deployment leads its own); None: ours, or unknown."""
    pid = preflight.listener(port)
    try:
        return pid if pid and os.getsid(pid) not in ours else None
    except ProcessLookupError:
        return None


def judge_ports(wanted: list[Wanted], problems: Mapping[str, str]) -> Iterator[Finding]:
    """Before a start. `problems`: key -> why the port cannot be used ("" when it can)."""
    taken = [port for port in wanted if problems[port.key]]
    for port in taken:
        fix = f"Stop that program, or give {port.key} another number."
        found = f"{port.key} {port.port}: {problems[port.key]}"
        yield fail(PORTS, found, "That process could not listen; launch refuses to start.", fix)
    if not taken:
        yield ok(PORTS, f"{', '.join(str(port.port) for port in wanted)}: free")


def judge_ports_in_use(
    wanted: list[Wanted], problems: Mapping[str, str], strangers: Mapping[str, int | None]
) -> Iterator[Finding]:
    """Of a deployment that runs: every port is taken, and by it."""
    fine = True
    for port in wanted:
        if not problems[port.key]:
            means = "The deployment runs, but nobody listens there: that process is down or restarting."
            yield warn(PORTS, f"{port.key} {port.port} is free", means, "pdserve status; then its log.")
            fine = False
        elif pid := strangers.get(port.key):
            means = "Requests for this part of the deployment go to somebody else."
            found = f"{port.key} {port.port}: pid {pid} listens there, which is none of this deployment"
            yield fail(PORTS, found, means, f"Stop pid {pid}, or give {port.key} another number and start again.")
            fine = False
    if fine:
        yield ok(PORTS, f"{', '.join(str(port.port) for port in wanted)}: in use by this deployment")


@dataclass(frozen=True)
class Clock:
    """A host's clock against ours, in seconds (positive: it is ahead); `error` when it did not answer."""

    host: str
    ahead: float = 0.0
    error: str = ""


def clocks(subject: Subject) -> Iterator[Finding]:
    urls = _urls(subject)
    if not urls:
        return
    yield judge_clocks([read_clock(url) for url in urls])


def _urls(subject: Subject) -> list[str]:
    """One address of each host that is not this one, and the proxy's own."""
    found: dict[str, str] = (
        {urllib.parse.urlsplit(subject.daemon).hostname or "": subject.daemon} if subject.daemon else {}
    )
    if subject.running is not None:
        found[urllib.parse.urlsplit(subject.running.url).hostname or ""] = subject.running.url
        for url in (*(u for urls in subject.running.engines.values() for u in urls), subject.running.admin_url or ""):
            if url:
                found.setdefault(urllib.parse.urlsplit(url).hostname or "", url)
    for other in subject.plan.elsewhere if subject.plan is not None else ():
        if other.url:
            found.setdefault(urllib.parse.urlsplit(other.url).hostname or "", other.url)
    return list(found.values())


# --- other hosts --------------------------------------------------------------------------------------------------


def hosts(subject: Subject) -> Iterator[Finding]:
    if subject.plan is None:
        return
    for other in subject.plan.elsewhere:
        if other.ready_url:
            yield judge_other(other, answers(other.ready_url))


def answers(url: str) -> str:
    """ "" when it answers with 200, else why it does not count."""
    try:
        with Client(url.rpartition("/")[0]) as client:
            status = client.get(f"/{url.rpartition('/')[2]}", timeout=_ASK_SECONDS).status_code
    except UpstreamError as error:
        return str(error)
    return "" if status == 200 else f"HTTP {status}"


def judge_other(other: Elsewhere, problem: str) -> Finding:
    label = f"{HOSTS} {other.host}"
    if not problem:
        return ok(label, f"{other.name} answers at {other.url}")
    means = f"From here {other.name} on {other.host} cannot be reached: not started yet, or the network does not let it through."
    fix = f"On {other.host}: pdserve launch ... --host {other.host}, then pdserve doctor ... --host {other.host}. Else the firewall."
    return warn(label, problem, means, fix)


def read_clock(url: str) -> Clock:
    """By the Date of an answer, which is in whole seconds, half the way there and back taken off."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=_ASK_SECONDS)
    try:
        begun = time.time()
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read(4096)
        middle = (begun + time.time()) / 2
        stamp = answer.getheader("Date")
    except (OSError, http.client.HTTPException) as error:
        return Clock(parts.hostname or url, error=str(error) or type(error).__name__)
    finally:
        connection.close()
    if stamp is None:
        return Clock(parts.hostname or url, error="its answers carry no Date")
    # The stamp was cut to the second: on average it is half a second behind.
    return Clock(parts.hostname or url, email.utils.parsedate_to_datetime(stamp).timestamp() + 0.5 - middle)


def judge_clocks(clocks: list[Clock]) -> Finding:
    told = [clock for clock in clocks if not clock.error]
    if not told:
        return skip(CLOCK, "; ".join(f"{clock.host}: {clock.error}" for clock in clocks))
    worst = max(told, key=lambda clock: abs(clock.ahead))
    if abs(worst.ahead) < SKEW_SECONDS:
        hosts = ", ".join(clock.host for clock in told)
        return ok(CLOCK, f"{hosts}: within {SKEW_SECONDS:g} s of this machine")
    way = "ahead of" if worst.ahead > 0 else "behind"
    found = f"{worst.host} is {abs(worst.ahead):.0f} s {way} this machine"
    fix = f"Set the clock of {worst.host}: run an NTP client there (systemd-timesyncd, chrony)."
    if abs(worst.ahead) >= WRONG_SECONDS:
        means = (
            "Logs and traces of the hosts cannot be put in order, TLS certificates and S3 signatures may be refused."
        )
        return fail(CLOCK, found, means, fix)
    return warn(CLOCK, found, "Logs and traces of the hosts are in the wrong order.", fix)

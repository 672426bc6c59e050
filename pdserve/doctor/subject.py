"""What is examined: always this machine; a topology, when one is given; a deployment, when one runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pdserve import target, topology
from pdserve.deploy import hosts, state
from pdserve.deploy import plan as plans
from pdserve.deploy.plan import Plan
from pdserve.errors import ConfigError, NotRunning, UpstreamError
from pdserve.openai_client import Client
from pdserve.target import Target
from pdserve.topology import Topology


@dataclass(frozen=True)
class Subject:
    """Everything that a check may look at. What is None does not exist here, and checks that need it are left out."""

    plan: Plan | None = None
    #: why the topology cannot even be planned (a wrong model path, for example)
    problem: ConfigError | None = None
    #: the deployment that answers now
    running: Target | None = None
    deployment: state.Deployment | None = None
    #: the admin address of a cache daemon, when that alone was named
    daemon: str = ""
    prompts: Path | None = None

    @property
    def topology(self) -> Topology | None:
        return self.plan.topology if self.plan else None

    @property
    def admin_url(self) -> str:
        return self.daemon or (self.running.admin_url or "" if self.running is not None else "")

    @property
    def is_fake(self) -> bool:
        """Engines without a model, and so without a connector."""
        return self.topology is not None and all(i.engine.kind == "fake" for i in self.topology.instances)

    def title(self) -> str:
        if self.daemon:
            return f"this machine and the cache daemon at {self.daemon}"
        if self.running is not None:
            return f"this machine and {self.running.name or self.running.url}, which runs"
        return f"this machine and {self.topology.name}, which does not run" if self.topology else "this machine"


def find(name: str | None, prompts: Path | None = None, host: str = "") -> Subject:
    """`name`: a topology, the name of a running deployment, a URL (a cache daemon's too); None: the one deployment that runs, if
    any. `host`: which part of a topology over several hosts.

    Raises ConfigError for a name that is none of them, NotRunning for a URL at which nobody answers.
    """
    up = target.running()
    if name is None:
        return _of(up[0], True, prompts, host) if len(up) == 1 else Subject(prompts=prompts)
    if "://" in name:
        return _at(name, up, prompts, host)
    same = [top for top in up if top.name == name]
    if same and not Path(name).exists():
        return _of(same[0], True, prompts, host)
    top = topology.load(name)
    running = next((other for other in up if other.name == top.name), None)
    return _of(running or top, running is not None, prompts, host)


def _at(url: str, up: list[Topology], prompts: Path | None, host: str) -> Subject:
    wanted = url.rstrip("/").removesuffix("/v1").replace("localhost", "127.0.0.1")
    mine = next((top for top in up if top.proxy and top.proxy.url == wanted), None)
    if mine is not None:
        return _of(mine, True, prompts, host)
    with Client(url) as client:
        if not client.healthy(timeout=5.0):
            if _is_daemon(client):
                return Subject(daemon=url.rstrip("/"), prompts=prompts)
            raise NotRunning(f"nothing answers at {url}/health. Start it (pdserve launch), or look at the address.")
    return Subject(running=Target(url=url, plain_url=""), prompts=prompts)


def _is_daemon(client: Client) -> bool:
    try:
        return client.get("/healthz", timeout=5.0).status_code == 200
    except UpstreamError:
        return False


def _of(top: Topology, is_up: bool, prompts: Path | None, host: str) -> Subject:
    hosts.chosen(top, host)  # a wrong or missing --host is the command's error, not a finding
    try:
        plan = plans.make(top, sorted(os.sched_getaffinity(0)), host=host)
    except ConfigError as error:
        return Subject(problem=error, prompts=prompts)
    record = state.read(plan.run_dir) if is_up else None
    running = Target.of(top) if is_up else None
    return Subject(plan, running=running, deployment=record, prompts=prompts)

"""Processes on the nodes of a Ray cluster: one placement group, one actor on each host, which runs what is planned there.

Ray finds the nodes, keeps the actors and notices when one dies; what happens on a node is the local backend's work. A host of
the topology is the Ray node with its address. pdserve must be installed at the same path on all of them. The actors belong to
the launcher: when it ends, however it ends, they end, and with them the processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pdserve.deploy import leftovers, probe
from pdserve.deploy.backends.base import Handle
from pdserve.deploy.backends.local import LocalBackend
from pdserve.deploy.plan import Process
from pdserve.errors import ConfigError, StartError
from pdserve.topology import Topology
from pdserve.topology_hosts import Host

#: for the cluster to have room for the group, and for the actors to be there
PLACE_SECONDS = 120.0
#: for one call: longer than the local backend's longest
CALL_SECONDS = 45.0
PROBE_SECONDS = 5.0
#: for an agent that replaces a dead one
REVIVE_SECONDS = 10.0
#: what an actor is killed by when its node is gone: the exit code of everything that it ran
_GONE = -9


class RayAgent:
    """On each host: the local backend, spoken to from afar. Answers are plain data; an error comes back as its text."""

    def __init__(self, variables: dict[str, str]) -> None:
        os.environ.update(variables)
        self._local = LocalBackend()
        self._handles: dict[int, Handle] = {}

    def start(self, process: Process) -> tuple[int, float, str]:
        try:
            handle = self._local.start(process)
        except StartError as error:
            return 0, 0.0, str(error)
        self._handles[handle.pid] = handle
        return handle.pid, handle.created, ""

    # A process that an earlier agent of this host ran has ended with it.

    def exit_code(self, pid: int) -> int | None:
        handle = self._handles.get(pid)
        return self._local.exit_code(handle) if handle else _GONE

    def interrupt(self, pid: int) -> None:
        if handle := self._handles.get(pid):
            self._local.interrupt(handle)

    def kill(self, pid: int) -> None:
        if handle := self._handles.get(pid):
            self._local.kill(handle)

    def remains(self, pid: int) -> list[int]:
        handle = self._handles.get(pid)
        return self._local.remains(handle) if handle else []

    def answers(self, url: str) -> bool:
        return probe.answers(url, PROBE_SECONDS)

    def remove(self, paths: list[str]) -> None:
        for path in paths:
            leftovers.remove(Path(path))


class RayBackend:
    """Fits backends/base.py. `hosts`: name -> what to ask of Ray there, e.g. {"CPU": 4, "node:10.0.0.1": 0.001}."""

    name = "ray"

    def __init__(
        self, hosts: Mapping[str, Mapping[str, float]], address: str | None = None, check: Sequence[str] = ()
    ) -> None:
        """Connects to the cluster (the one of this process, if it has one) and places the actors. `check`: addresses that
        must be nodes of it. Raises StartError or ConfigError."""
        try:
            import ray
        except ImportError as error:
            fix = "pip install 'pdserve[ray]', or run pdserve launch --host NAME on each host."
            raise ConfigError("--backend", "ray is not installed here", fix) from error
        self._ray = ray
        self._mine = not ray.is_initialized()
        if self._mine:
            try:
                ray.init(address=address or "auto", log_to_driver=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                fix = "Start it: ray start --head here, ray start --address=HEAD on the others; RAY_ADDRESS says where it is."
                fix += " If it was started with a token (it said so), set RAY_AUTH_MODE=token."
                raise StartError(f"no Ray cluster answers ({error}). {fix}") from error
        self._agents: dict[str, Any] = {}
        self._places: dict[str, dict[str, Any]] = {}  # by host: where its agent belongs, as Ray is told
        self._dead: set[str] = set()  # hosts whose agent has ended
        try:
            self._check(check)
            self._place(hosts)
        except BaseException:
            self.close()
            raise

    def _check(self, addresses: Sequence[str]) -> None:
        nodes = {node["NodeManagerAddress"] for node in self._ray.nodes() if node["Alive"]}
        for i, address in enumerate(addresses):
            if address not in nodes:
                problem = f"no node of the Ray cluster is {address}; it has {', '.join(sorted(nodes))}"
                raise ConfigError(
                    f"hosts[{i}].address", problem, "Give the address that `ray status` shows, or join the node."
                )

    def _place(self, hosts: Mapping[str, Mapping[str, float]]) -> None:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._group = placement_group([dict(wanted) for wanted in hosts.values()], strategy="SPREAD")
        if not self._group.wait(PLACE_SECONDS):
            asked = "; ".join(f"{name}: {dict(w)}" for name, w in hosts.items())
            raise StartError(
                f"Ray had no room for the deployment within {PLACE_SECONDS:g} s ({asked}). See: ray status"
            )
        for i, (name, share) in enumerate(hosts.items()):
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=i)
            self._places[name] = {
                "scheduling_strategy": strategy,
                "num_cpus": share.get("CPU", 0),
                "num_gpus": share.get("GPU", 0),
                "max_restarts": 0,  # what it ran is gone with it: the supervisor starts both anew
            }
            self._agents[name] = self._agent(name)

    def _agent(self, host: str) -> Any:
        variables = {name: value for name, value in os.environ.items() if name.startswith("PDSERVE_")}
        return self._ray.remote(RayAgent).options(**self._places[host]).remote(variables)

    def _revive(self, host: str) -> None:
        """Another agent where one was killed, as Ray does when memory runs short, or whose node died and is back. It must be
        there soon: everybody waits."""
        from ray.util.placement_group import placement_group_table

        try:
            if placement_group_table(self._group).get("state") != "CREATED":
                return  # a node is gone, and Ray looks for another
            agent = self._agent(host)
            try:
                self._ray.get(agent.remains.remote(0), timeout=REVIVE_SECONDS)
            except self._ray.exceptions.RayError:
                self._ray.kill(agent)
                return
        except (self._ray.exceptions.RayError, ConnectionError):
            return
        self._agents[host] = agent
        self._dead.discard(host)

    # ---- backends/base.py ----

    def start(self, process: Process) -> Handle:
        if process.host in self._dead:
            self._revive(process.host)
        pid, created, error = self._call(process.host, "start", process, lost=(0, 0.0, "its host is gone"))
        if error:
            raise StartError(error)
        return _Placed(process.name, pid, created, process.host)

    def exit_code(self, handle: Handle) -> int | None:
        code: int | None = self._call(_host(handle), "exit_code", handle.pid, lost=_GONE)
        return code

    def interrupt(self, handle: Handle) -> None:
        self._call(_host(handle), "interrupt", handle.pid, lost=None)

    def kill(self, handle: Handle) -> None:
        self._call(_host(handle), "kill", handle.pid, lost=None)

    def remains(self, handle: Handle) -> list[int]:
        left: list[int] = self._call(_host(handle), "remains", handle.pid, lost=[])
        return left

    # ---- what differs from processes of this machine ----

    def answers(self, process: Process) -> bool:
        """Asks the process's URL from its own host, where it may be on loopback."""
        return bool(self._call(process.host, "answers", process.ready_url, lost=False))

    def remove(self, process: Process) -> None:
        self._call(process.host, "remove", [str(path) for path in process.leftovers], lost=None)

    def close(self) -> None:
        """Ends the actors; what they still run ends with them."""
        from ray.util.placement_group import remove_placement_group

        for agent in self._agents.values():
            self._ray.kill(agent)
        self._agents.clear()
        if (group := getattr(self, "_group", None)) is not None:
            remove_placement_group(group)
        if self._mine:
            self._ray.shutdown()

    def _call(self, host: str, method: str, *words: Any, lost: Any) -> Any:
        """`lost` is the answer of a host that is gone, or does not answer in time."""
        agent = self._agents.get(host) or next(iter(self._agents.values()), None)
        if agent is None or host in self._dead:
            return lost
        try:
            return self._ray.get(getattr(agent, method).remote(*words), timeout=CALL_SECONDS)
        except self._ray.exceptions.RayTaskError:
            raise  # the agent's own mistake
        except (self._ray.exceptions.GetTimeoutError, self._ray.exceptions.ActorUnavailableError):
            return lost  # it may be there all the same
        except (self._ray.exceptions.RayError, ConnectionError):  # killed, out of memory, no cluster any more
            self._dead.add(host)
            return lost


def for_topology(topology: Topology) -> RayBackend:
    """One actor on each host, which must be a node of the running cluster. Raises StartError or ConfigError."""
    return RayBackend({h.name: wanted(topology, h) for h in topology.hosts}, check=[h.address for h in topology.hosts])


def wanted(topology: Topology, host: Host) -> dict[str, float]:
    """What Ray keeps free there for us: the node itself, its GPUs that we use, a core for the agent."""
    gpus = sum(
        i.engine.ranks for i in topology.instances if i.on == host.name and i.engine.device == "cuda"
    )
    return {f"node:{host.address}": 0.001, "CPU": 1.0, **({"GPU": float(gpus)} if gpus else {})}


class _Placed(Handle):
    """A handle that knows its host."""

    host: str

    def __init__(self, name: str, pid: int, created: float, host: str) -> None:
        super().__init__(name, pid, created)
        object.__setattr__(self, "host", host)


def _host(handle: Handle) -> str:
    return str(getattr(handle, "host", ""))

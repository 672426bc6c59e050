"""The Ray backend against a real Ray, started here on this one machine and ended by what started it."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from ports import free_port

from pdserve import topology
from pdserve.deploy import plan as plans
from pdserve.deploy.backends import conformance
from pdserve.deploy.backends.base import Backend
from pdserve.deploy.backends.local import marked
from pdserve.deploy.backends.ray import RayBackend, for_topology
from pdserve.deploy.plan import Process
from pdserve.deploy.state import Deployment
from pdserve.deploy.supervise import Supervisor
from pdserve.errors import ConfigError

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (pdserve[ray])"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning"),  # Ray's own
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    folder = tempfile.mkdtemp(prefix="pdray", dir="/tmp")  # the path of its sockets must be short
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder, resources={"a": 1, "b": 1},
            _system_config={"memory_monitor_refresh_ms": 0},  # it would end agents when other tests fill the memory
        )  # fmt: skip
        try:
            yield
        finally:
            ray.shutdown()  # ends the processes that init started, and only them
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def backend(cluster: None) -> Iterator[RayBackend]:
    made = RayBackend({"a": {"CPU": 0.5, "a": 0.1}, "b": {"CPU": 0.5, "b": 0.1}})
    yield made
    made.close()


@pytest.mark.parametrize("rule", conformance.RULES, ids=lambda rule: rule.__name__)
def test_conformance(rule: Callable[[Backend, Path], None], backend: RayBackend, tmp_path: Path) -> None:
    rule(backend, tmp_path)


def test_a_killed_agent_takes_its_processes_with_it_and_the_next_start_makes_another(
    backend: RayBackend, tmp_path: Path
) -> None:
    def at(host: str, name: str) -> Process:
        return replace(conformance.process(tmp_path, conformance.SLEEP, name), host=host)

    lost, fellow, other = (backend.start(at(*where)) for where in (("a", "one"), ("a", "two"), ("b", "three")))
    agent = psutil.Process(lost.pid).parent()
    assert agent is not None
    assert "RayAgent" in agent.name() + " ".join(agent.cmdline())
    agent.kill()
    conformance.soon(lambda: backend.exit_code(lost) is not None, "its death is noticed")
    conformance.soon(lambda: not psutil.pid_exists(lost.pid) and not psutil.pid_exists(fellow.pid), "nothing is left")
    assert backend.exit_code(other) is None, "the other host goes on"
    again = backend.start(at("a", "one"))
    assert backend.exit_code(again) is None
    assert backend.exit_code(fellow) == -9, "the new agent knows that what the former one ran is gone"
    backend.interrupt(fellow)
    backend.kill(fellow)
    assert backend.remains(fellow) == []
    for handle in (again, other):
        backend.kill(handle)


HOSTS = """
name: ray-fake
model: demo
hosts: [{{name: a, address: {address}}}]
engine: {{kind: fake, device: cpu}}
prefill: [{{port: {p}, host: a}}]
decode: [{{port: {d}, host: a}}]
proxy: {{port: {proxy}}}
"""


def test_a_deployment_comes_up_and_goes(cluster: None, tmp_path: Path) -> None:
    """The supervisor here, the processes through Ray: proxy and two engines, ready, then nothing left."""
    import ray

    address = ray.nodes()[0]["NodeManagerAddress"]
    ports = dict(zip(("p", "d", "proxy"), (free_port() for _ in range(3)), strict=True))
    top = topology.parse(HOSTS.format(address=address, **ports))
    plan = plans.make_all(top, {"a": [0, 1]}, run_root=tmp_path)
    plan.run_dir.mkdir(parents=True)
    backend = for_topology(top)
    seen: list[str] = []

    async def story() -> None:
        ready = asyncio.Event()

        def changed(deployment: Deployment) -> None:
            seen.append(deployment.state)
            if deployment.state in ("ready", "failed"):
                ready.set()

        supervisor = Supervisor(plan, backend, on_change=changed)
        running = asyncio.create_task(supervisor.run())
        await asyncio.wait_for(ready.wait(), 120)
        supervisor.stop()
        await running

    try:
        asyncio.run(story())
    finally:
        backend.close()
    assert "ready" in seen
    assert seen[-1] == "stopped"
    assert marked(str(plan.processes[0].cwd)) == []


def test_a_host_that_is_no_node_is_said_so(cluster: None) -> None:
    top = topology.parse(HOSTS.format(address="192.0.2.7", p=1, d=2, proxy=3))
    with pytest.raises(ConfigError, match=r"hosts\[0\].address: no node of the Ray cluster is 192\.0\.2\.7"):
        for_topology(top)


def test_the_command_itself(cluster: None, tmp_path: Path) -> None:
    """`pdserve launch --backend ray`, status and an end by Ctrl-C, as a user has them."""
    import ray

    address = ray.nodes()[0]["NodeManagerAddress"]
    ports = dict(zip(("p", "d", "proxy"), (free_port() for _ in range(3)), strict=True))
    file = tmp_path / "t.yaml"
    file.write_text(HOSTS.format(address=address, **ports).replace("ray-fake", "ray-command"))
    gcs = ray.get_runtime_context().gcs_address
    variables = {**os.environ, "RAY_ADDRESS": gcs, "PDSERVE_RUN_DIR": str(tmp_path / "run")}
    command = [sys.executable, "-P", "-m", "pdserve"]
    with (tmp_path / "log").open("wb") as log:
        launch = subprocess.Popen(
            [*command, "launch", str(file), "--backend", "ray"], env=variables, stdout=log, stderr=log
        )
    try:
        told = tmp_path / "run" / "ray-command" / "state.json"
        deadline = time.monotonic() + 120
        while not (told.exists() and json.loads(told.read_text())["state"] == "ready"):
            assert launch.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        done = subprocess.run([*command, "status", "--json"], env=variables, capture_output=True, text=True, timeout=60)
        (facts,) = json.loads(done.stdout)
        assert (facts["state"], facts["backend"], done.returncode) == ("ready", "ray", 0)
        assert {(p["name"], p["host"]) for p in facts["processes"]} == {
            ("prefill-0", "a"),
            ("decode-0", "a"),
            ("proxy", "a"),
        }
        launch.send_signal(signal.SIGINT)
        assert launch.wait(90) == 0
    finally:
        launch.kill()
        launch.wait()
    assert json.loads(told.read_text())["state"] == "stopped"
    assert marked(str(tmp_path / "run" / "ray-command@a")) == []

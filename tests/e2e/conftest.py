"""Real deployments for the end-to-end tests: one at a time, each started once, stopped before the next one starts.

float32 throughout, so that greedy tokens must be equal. The engines can empty their own prefix caches
(VLLM_SERVER_DEV_MODE), so that a hit is a hit of ours. What is found is loaded however long it takes: a machine that is slow
makes lookups late and loading dear, and neither is what is tested here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ports import free_port

from pdserve import env, topology
from pdserve import target as targets
from pdserve.openai_client import Client, Completion, total
from pdserve.prompts import make_ids
from pdserve.target import Target
from pdserve.topology import Topology

PD = """
name: e2e-pd
model: demo
engine:
  device: cpu
  dtype: float32
  max_model_len: 4096
  max_num_seqs: 8
  kv_cache_space_gib: 1
  env: {VLLM_SERVER_DEV_MODE: "1"}
  extra_args: ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
prefill: [{port: 8110, cpus: "0"}]
decode: [{port: 8210, cpus: "1"}]
plain: [{port: 8310, cpus: "0"}]
cache: {size: 2GiB, load: always, patience: 20, admin_port: 8090}
proxy: {port: 8010}
"""

# 24 blocks of 128 tokens: eight requests of 300 + 200 tokens do not fit, so the scheduler has to preempt.
BOTH = """
name: e2e-both
model: demo
engine:
  device: cpu
  dtype: float32
  max_model_len: 2048
  max_num_seqs: 8
  kv_cache_space_gib: 1
  env: {VLLM_SERVER_DEV_MODE: "1"}
both: [{port: 8120, cpus: "0", max_num_batched_tokens: 512, extra_args: ["--num-gpu-blocks-override", "24"]}]
plain: [{port: 8310, cpus: "1"}]
cache: {size: 1GiB, load: always, patience: 20, admin_port: 8090}
proxy: {port: 8010}
"""

TOPOLOGIES = {"pd": PD, "both": BOTH}


@dataclass
class Deployment:
    """A running topology and the questions tests ask it."""

    top: Topology
    target: Target
    client: Client
    plain: Client

    def ids(self, count: int, seed: int | None = None) -> tuple[int, ...]:
        """A prompt of exactly so many tokens that nothing has seen before."""
        return make_ids(random.Random(seed), self.plain.tokenize, count)

    def reference(self, prompt: Any, **options: Any) -> Completion:
        """Plain vLLM's answer, computed and not hit."""
        assert self.plain.reset_prefix_cache()
        return self.plain.complete(prompt, **options)

    def forget(self) -> None:
        """Only pdserve's cache can hit after this."""
        assert self.target.empty_engine_caches()

    def status(self) -> dict[str, Any]:
        """The cache daemon's own view."""
        with Client(f"{self.target.admin_url}") as admin:
            answer: dict[str, Any] = admin.get("/status", timeout=10).json()
        return answer

    def processes(self) -> dict[str, dict[str, Any]]:
        """`pdserve status --json`, by process name."""
        done = run_pdserve("status", self.top.name, "--json")
        deployment = json.loads(done.stdout)
        deployment = deployment[0] if isinstance(deployment, list) else deployment
        return {p["name"]: p for p in deployment["processes"]}

    def pid(self, name: str) -> int:
        """0 while there is none."""
        return int(self.processes()[name]["pid"] or 0)

    def metric(self, role: str, name: str, **labels: str) -> float:
        """A metric summed over the engines of a role."""
        found = 0.0
        for url in self.target.engines[role]:
            with Client(url) as engine:
                found += total(engine.metrics(), name, **labels)
        return found

    def retrieved(self, *roles: str) -> int:
        counts = self.target.prompt_tokens_by_source(*roles)
        assert counts is not None
        return counts["external_kv_transfer"]

    def wait_up(self, seconds: float = 240.0) -> None:
        """Every engine and the proxy answer their health checks."""
        for url in (*(url for urls in self.target.engines.values() for url in urls), self.target.url):
            with Client(url) as client:
                wait_for(client.healthy, seconds, f"{url} is not up")

    def wait_idle(self, seconds: float = 120.0) -> None:
        """No engine works, nothing is leased or reserved."""

        def idle() -> bool:
            roles = [role for role, urls in self.target.engines.items() if urls]
            return all(
                self.metric(role, f"vllm:num_requests_{what}") == 0 for role in roles for what in ("running", "waiting")
            )

        wait_for(idle, seconds, "an engine still works")
        left = self.target.wait_for_no_leases(seconds)
        assert not left, f"left in the cache daemon: {left}"


def wait_for(condition: Callable[[], Any], seconds: float, what: str, log: Path | None = None) -> None:
    """Polls until the condition holds; fails with `what`, and the end of the log, when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            end = f":\n{log.read_text()[-2000:]}" if log is not None else ""
            raise AssertionError(f"{what} after {seconds:g} s{end}")
        time.sleep(0.1)


@contextmanager
def proxy_before(deployment: Deployment, folder: Path, *words: str) -> Iterator[Client]:
    """A proxy of its own before engines that run, ended with the block."""
    port, log = free_port(), folder / "proxy.log"
    command = [sys.executable, "-P", "-m", "pdserve", "proxy", "--port", str(port), *words]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
    try:
        with Client(f"http://127.0.0.1:{port}", model=deployment.client.model, timeout=240) as client:
            wait_for(client.healthy, 120, "the proxy was not ready", log)
            yield client
    finally:
        process.terminate()
        process.wait(60)


def run_pdserve(*words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The installed command, as a user would run it."""
    command = [sys.executable, "-P", "-m", "pdserve", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


class Stage:
    """Holds at most one running deployment: two would not fit a small machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = ""
        self.shared_memory: set[str] = set()
        self.current: Deployment | None = None

    def get(self, name: str) -> Deployment:
        if self.current is not None and self.name == name:
            self.current.wait_up()  # a test that failed may have left a part restarting
            return self.current
        self.close()
        file = self.folder / f"e2e-{name}.yaml"
        file.write_text(TOPOLOGIES[name])
        top = topology.load(file)
        self.shared_memory = _shared_memory(top.name)
        try:
            targets.launch(file)
        except BaseException:
            targets.stop(top.name)  # what came up of it would be in the way of the next try
            raise
        self.name, target = name, Target.of(top)
        self.current = Deployment(top, target, Client(target.url, timeout=120), Client(target.plain_url, timeout=120))
        for client in (self.current.client, self.current.plain):  # the first requests compile
            client.complete([11] * 300, max_tokens=2)
        return self.current

    def close(self) -> None:
        """Stops what runs, and checks that nothing of it is left."""
        if self.current is None:
            return
        name = self.current.top.name
        pids = [p["pid"] for p in self.current.processes().values() if p["pid"]]
        trees = [child for pid in pids if psutil.pid_exists(pid) for child in _tree(pid)]
        self.current.client.close()
        self.current.plain.close()
        self.current = None
        targets.stop(name)
        alive = psutil.wait_procs(trees, timeout=60)[1]
        assert not alive, f"still running after stop: {alive}"
        left = _shared_memory(name) - self.shared_memory - _mapped()  # what is mapped is in use by somebody else
        assert not left, f"left in /dev/shm: {left}"
        assert not (env.run_root() / name / "cache.sock").exists(), "the cache's socket was left"


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _shared_memory(name: str) -> set[str]:
    """The deployment's files in /dev/shm, and those that Python's multiprocessing makes in an engine."""
    patterns = (f"pdserve-{name}*", "psm_*", "sem.mp-*")
    return {str(path) for pattern in patterns for path in Path("/dev/shm").glob(pattern)}


def _mapped() -> set[str]:
    """Shared-memory files that some process has mapped."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:  # it ended just now
            continue
        found |= {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}
    return found


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here")
    stage = Stage(tmp_path_factory.mktemp("e2e"))
    try:
        yield stage
    finally:
        stage.close()


@pytest.fixture
def pd(stage: Stage) -> Deployment:
    """One producer, one consumer, a cache, a proxy, and a plain engine to compare with."""
    return stage.get("pd")


@pytest.fixture
def both(stage: Stage) -> Deployment:
    """One engine of both roles with very little KV space, a cache, a proxy, and a plain engine."""
    return stage.get("both")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """A failure here is looked into from its output alone: what the processes said last is part of it."""
    report = yield
    if report.failed and Path(__file__).parent in item.path.parents:
        folders = (env.run_root().glob("*/logs/*.log"), Path(f"/tmp/pdh{os.getpid()}").glob("*/*/logs/*.log"))
        for log in sorted(path for found in folders for path in found):
            if log.stat().st_mtime >= call.start - 5:
                last = log.read_text(errors="replace")[-20_000:].splitlines()[-40:]
                report.sections.append((f"end of {log}", "\n".join(last)))
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks these tests, and sorts them so that each deployment starts once and its leak check comes last."""
    mine = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in mine:
        item.add_marker(pytest.mark.e2e)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(420))  # the first test of a deployment waits for it to start

    def place(item: pytest.Item) -> tuple[int, bool]:
        fixtures = getattr(item, "fixturenames", ())
        others = [n for n, name in enumerate(("truth", "both", "spread"), 1) if name in fixtures]
        return (max(others, default=0), "leak" in item.name)

    rest = [item for item in items if item not in mine]
    items[:] = rest + sorted(mine, key=place)

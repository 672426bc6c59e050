"""The supervisor with real processes: order, readiness, restart, giving up, and above all that nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from pdserve.deploy import cleanup, state
from pdserve.deploy.backends.base import Handle
from pdserve.deploy.backends.local import LocalBackend, end_session, is_running, session_members
from pdserve.deploy.plan import Plan
from pdserve.deploy.supervise import Settings, Supervisor
from pdserve.errors import StartError

if TYPE_CHECKING:
    from .conftest import Make

QUICK = Settings(
    backoff=(0.05, 0.1), stop_grace=2.0, starting_grace=0.5, probe_every=0.05, watch_every=0.1, unhealthy_after=2
)
WAIT = 120.0


class Running:
    """A supervisor in this loop, with the history of what it reported."""

    def __init__(self, plan: Plan, settings: Settings = QUICK) -> None:
        self.history: list[tuple[str, str]] = []
        self.supervisor = Supervisor(plan, LocalBackend(0.5), settings, self._note)
        self.task = asyncio.create_task(self.supervisor.run())

    def _note(self, deployment: state.Deployment) -> None:
        for record in deployment.processes:
            news = (record.name, record.state)
            if news not in self.history[-len(deployment.processes) :]:
                self.history.append(news)

    @property
    def deployment(self) -> state.Deployment:
        return self.supervisor.deployment

    async def until(self, condition: Callable[[state.Deployment], bool]) -> None:
        deadline = time.monotonic() + WAIT
        while not condition(self.deployment):
            assert time.monotonic() < deadline, self.history
            assert not self.task.done(), self.task.exception()
            await asyncio.sleep(0.02)

    async def ready(self) -> None:
        await self.until(lambda deployment: deployment.state == "ready")

    def family(self) -> list[int]:
        pids = [record.pid for record in self.deployment.processes if record.pid]
        return [p.pid for pid in pids for p in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]


@contextlib.asynccontextmanager
async def running(plan: Plan, settings: Settings = QUICK) -> AsyncIterator[Running]:
    run = Running(plan, settings)
    try:
        yield run
    finally:
        run.supervisor.stop()
        with contextlib.suppress(StartError):
            await asyncio.wait_for(run.task, WAIT)


def die(url: str) -> None:
    with contextlib.suppress(urllib.error.URLError, ConnectionError, OSError):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/die", timeout=30)


def alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [pid] if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else []
    return found


def test_start_in_order_and_stop_in_order(make_plan: Make, run_dir: Path) -> None:
    plan = make_plan(cache="ok", left="ok", right="ok", proxy="ok")
    (run_dir / "cache.arena").write_text("x")

    async def story() -> tuple[list[int], list[tuple[str, str]]]:
        async with running(plan) as run:
            await run.ready()
            recorded = state.read(run_dir)
            assert recorded is not None
            assert recorded.state == "ready"
            assert recorded.supervisor_alive()
            family = run.family()
            assert len(family) == 8  # four servers, a child each
        return family, run.history

    family, history = asyncio.run(story())
    assert alive(family) == []

    def place(name: str, to: str) -> int:
        return history.index((name, to))

    assert place("cache", "ready") < min(place("left", "starting"), place("right", "starting"))
    assert max(place("left", "ready"), place("right", "ready")) < place("proxy", "starting")
    assert place("proxy", "stopped") < min(place("left", "stopping"), place("right", "stopping"))
    assert max(place("left", "stopped"), place("right", "stopped")) < place("cache", "stopping")
    assert not (run_dir / "cache.arena").exists()
    final = state.read(run_dir)
    assert final is not None
    assert (final.state, {record.state for record in final.processes}) == ("stopped", {"stopped"})


class Stubborn(LocalBackend):
    """Fails at the first process that it is to end."""

    failed = False

    def kill(self, handle: Handle) -> None:
        super().kill(handle)
        if not self.failed:
            self.failed = True
            raise PermissionError("not ours")


def test_one_that_cannot_be_ended_does_not_keep_the_others(make_plan: Make) -> None:
    async def story() -> tuple[list[int], Supervisor]:
        run = Running(make_plan(cache="ok", left="ok", proxy="ok"))
        run.supervisor.backend = Stubborn(0.5)
        await run.ready()
        family = run.family()
        run.supervisor.stop()
        with pytest.raises(PermissionError):
            await asyncio.wait_for(run.task, WAIT)
        return family, run.supervisor

    family, supervisor = asyncio.run(story())
    assert alive(family) == []
    assert (supervisor.deployment.state, supervisor.deployment.error) == ("failed", "not ours")


def test_a_process_that_cannot_start_ends_the_launch(make_plan: Make) -> None:
    plan = make_plan(cache="ok", left="ok", right="exit")
    supervisor = Supervisor(plan, LocalBackend(), QUICK)
    with pytest.raises(StartError) as caught:
        asyncio.run(asyncio.wait_for(supervisor.run(), WAIT))
    message = str(caught.value)
    # The cause, not its consequence below it; then the tail and where the whole log is.
    assert message.startswith("right could not start: exited with code 3 after ")
    assert ": ValueError: no such weights\n" in message
    assert "    RuntimeError: Engine core initialization failed." in message
    assert str(plan.run_dir / "logs" / "right.log") in message
    assert supervisor.deployment.state == "failed"
    assert supervisor.deployment.of("right").state == "failed"
    assert supervisor.deployment.of("left").state == "stopped"


def test_a_command_that_does_not_exist(make_plan: Make) -> None:
    plan = make_plan(left="ok")
    plan = replace(plan, processes=(replace(plan.processes[0], argv=("/no/such/vllm", "serve")),))
    with pytest.raises(StartError, match="/no/such/vllm: No such file or directory"):
        asyncio.run(asyncio.wait_for(Supervisor(plan, LocalBackend(), QUICK).run(), WAIT))


def test_readiness_has_a_deadline(make_plan: Make) -> None:
    plan = make_plan(start_timeout=3.0, left="silent")
    with pytest.raises(StartError, match=r"left could not start: not ready within its 3 s(.|\n)*still loading"):
        asyncio.run(asyncio.wait_for(Supervisor(plan, LocalBackend(), QUICK).run(), WAIT))


def test_a_crash_is_restarted_and_counted(make_plan: Make) -> None:
    async def story() -> None:
        async with running(make_plan(cache="ok", left="ok", proxy="ok")) as run:
            await run.ready()
            family = run.family()
            await asyncio.to_thread(die, run.deployment.of("left").url)
            await run.until(lambda d: d.of("left").restarts == 1 and d.state == "ready")
            assert ("left", "restarting") in run.history
            assert run.deployment.of("proxy").restarts == 0
            # The dead one's child did not survive it.
            assert len(alive(family)) == len(family) - 2

    asyncio.run(story())


def test_what_a_process_left_is_there_for_its_next_life_and_gone_in_the_end(make_plan: Make) -> None:
    """The cache's memory and journal: a killed daemon is to find its chunks again."""

    async def story() -> None:
        plan = make_plan(cache="ok", left="ok", proxy="ok")
        (kept,) = plan.processes[0].leftovers
        kept.write_text("chunks")
        async with running(plan) as run:
            await run.ready()
            await asyncio.to_thread(die, run.deployment.of("cache").url)
            await run.until(lambda d: d.of("cache").restarts == 1 and d.state == "ready")
            assert kept.read_text() == "chunks"
        assert not kept.exists()

    asyncio.run(story())


def test_restarts_are_bounded_and_the_rest_goes_on(make_plan: Make) -> None:
    async def story() -> None:
        async with running(make_plan(cache="ok", left="once", right="ok")) as run:
            await run.ready()
            await asyncio.to_thread(die, run.deployment.of("left").url)
            await run.until(lambda d: d.of("left").state == "failed")
            assert run.deployment.of("left").restarts == 2
            assert "2 restarts did not help" in run.deployment.of("left").detail
            assert run.deployment.state == "degraded"
            assert run.deployment.of("right").state == "ready"

    asyncio.run(story())


def test_without_any_engine_it_gives_up(make_plan: Make) -> None:
    async def story() -> None:
        async with running(make_plan(cache="ok", left="once")) as run:
            await run.ready()
            await asyncio.to_thread(die, run.deployment.of("left").url)
            with pytest.raises(StartError, match=r"left was given up: .*OSError: it does not come back"):
                await asyncio.wait_for(run.task, WAIT)

    asyncio.run(story())


def test_a_sick_process_is_reported_and_left_alone(make_plan: Make, run_dir: Path) -> None:
    async def story() -> None:
        async with running(make_plan(left="ok")) as run:
            await run.ready()
            pid = run.deployment.of("left").pid
            (run_dir / "sick").touch()
            await run.until(lambda d: d.of("left").state == "unhealthy")
            assert run.deployment.state == "degraded"
            (run_dir / "sick").unlink()
            await run.ready()
            assert run.deployment.of("left").pid == pid

    asyncio.run(story())


def test_what_does_not_listen_is_killed(make_plan: Make) -> None:
    async def story() -> list[int]:
        async with running(make_plan(left="deaf"), Settings(probe_every=0.05, stop_grace=0.3)) as run:
            await run.ready()
            return run.family()

    assert alive(asyncio.run(story())) == []


def test_a_full_disk_and_a_closed_terminal_do_not_keep_processes_alive(
    make_plan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    async def story() -> list[int]:
        async with running(make_plan(cache="ok", left="ok")) as run:
            await run.ready()
            monkeypatch.setattr(state, "write", full)
            run.supervisor.on_change = full
            return run.family()

    assert alive(asyncio.run(story())) == []


def test_stop_while_starting(make_plan: Make) -> None:
    async def story() -> None:
        async with running(make_plan(cache="ok", left="silent")) as run:
            await run.until(lambda d: d.of("left").state == "starting")
        assert run.deployment.state == "stopped"

    asyncio.run(story())


# A supervisor as a process of its own, so that it can be killed.
ALONE = """
import asyncio, pickle, signal, sys
from pdserve.deploy.backends.local import LocalBackend
from pdserve.deploy.supervise import Settings, Supervisor
async def main():
    supervisor = Supervisor(pickle.load(open(sys.argv[1], "rb")), LocalBackend(), Settings(probe_every=0.05))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, supervisor.stop)
    await supervisor.run()
asyncio.run(main())
"""


def start_alone(plan: Plan, tmp_path: Path) -> tuple[subprocess.Popen[bytes], state.Deployment]:
    (tmp_path / "plan").write_bytes(pickle.dumps(plan))
    process = subprocess.Popen([sys.executable, "-P", "-c", ALONE, str(tmp_path / "plan")])
    deadline = time.monotonic() + WAIT
    while True:
        deployment = state.read(plan.run_dir)
        if deployment and deployment.state == "ready":
            return process, deployment
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def families(deployment: state.Deployment) -> list[int]:
    pids = [record.pid for record in deployment.processes if record.pid]
    return [p.pid for pid in pids for p in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]


def test_sigterm_leaves_nothing(make_plan: Make, tmp_path: Path) -> None:
    process, deployment = start_alone(make_plan(cache="ok", left="ok", proxy="ok"), tmp_path)
    family = families(deployment)
    process.terminate()
    assert process.wait(WAIT) == 0
    assert alive(family) == []


def test_kill_of_the_supervisor_leaves_nothing_after_stop(make_plan: Make, run_dir: Path, tmp_path: Path) -> None:
    process, deployment = start_alone(make_plan(cache="ok", left="deaf", proxy="ok"), tmp_path)
    family = families(deployment)
    (run_dir / "cache.arena").write_text("x")
    process.kill()
    process.wait(WAIT)
    # Those that listen end by themselves: the kernel tells them. The deaf one and the children stay.
    assert is_running(deployment.of("left").pid or 0, deployment.of("left").created)
    said = cleanup.stop(deployment, grace=0.5)
    assert alive(family) == []
    assert any("left" in line for line in said)
    assert not (run_dir / "cache.arena").exists()
    final = state.read(run_dir)
    assert final is not None
    assert final.state == "stopped"
    assert cleanup.stop(final) == []


def test_stop_of_a_well_supervisor(make_plan: Make, tmp_path: Path) -> None:
    process, deployment = start_alone(make_plan(left="ok"), tmp_path)
    family = families(deployment)
    threading.Thread(target=process.wait, daemon=True).start()  # takes the zombie away: it is our child, not init's
    assert cleanup.stop(deployment) == ["stopped"]
    assert alive(family) == []


def test_a_reused_pid_is_not_ours() -> None:
    assert is_running(os.getpid(), psutil.Process().create_time())
    assert not is_running(os.getpid(), psutil.Process().create_time() - 100)
    leader = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        created = psutil.Process(leader.pid).create_time()
        assert session_members(leader.pid, created) == [leader.pid]
        assert session_members(leader.pid, created - 100) == []
    finally:
        leader.kill()
        leader.wait(10)
    # What a container sees of processes whose session was begun outside of it: 0, which nothing here leads.
    assert session_members(0, 1.0) == []


def test_shared_memory_of_a_killed_engine_is_removed(make_plan: Make, run_dir: Path) -> None:
    """What multiprocessing leaves in /dev/shm when its owner is killed with its resource tracker."""
    code = """
import sys, time, signal
from multiprocessing import resource_tracker, shared_memory
memory = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister(memory._name, "shared_memory")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(memory.name, flush=True)
time.sleep(600)
"""
    plan = make_plan(left="ok")
    process = replace(plan.processes[0], argv=(sys.executable, "-c", code))
    backend = LocalBackend()
    handle = backend.start(process)
    deadline = time.monotonic() + WAIT
    while "psm_" not in process.log.read_text().splitlines()[-1]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    shared = Path("/dev/shm") / process.log.read_text().splitlines()[-1].strip()
    assert shared.exists()
    end_session(handle.pid, handle.created, seconds=0.2)
    assert backend.remains(handle) == []
    assert not shared.exists()

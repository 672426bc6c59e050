"""Brings a plan up, keeps it up, takes it down. One task per process; whatever ends the deployment cancels them all.

Start: a process starts when those it depends on are ready (cache, then engines side by side, then proxy). A process
that cannot start the first time ends the whole launch; later deaths are restarted with back-off, a bounded number of
times. Stop: proxy first, so that no new request meets a half-stopped deployment; then engines, then the cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import httpx

from pdserve.deploy import leftovers, logtail, remedies, state
from pdserve.deploy.backends.base import Backend, Handle
from pdserve.deploy.backends.local import created_at
from pdserve.deploy.hosts import Elsewhere
from pdserve.deploy.plan import Plan, Process
from pdserve.errors import StartError

STOP_ORDER = (("proxy",), ("prefill", "decode", "both", "plain"), ("cache",))


@dataclass(frozen=True)
class Settings:
    backoff: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 30.0)  # before restart 1, 2, ...; no more restarts in a row
    steady_after: float = 120.0  # up for this long: earlier deaths are forgotten
    stop_grace: float = 25.0  # for a process to end by itself before it is killed
    starting_grace: float = 3.0  # the same while it starts: it serves nobody, and vLLM does not listen before it is up
    probe_every: float = 0.25
    watch_every: float = 2.0
    unhealthy_after: int = 3  # probes missed in a row


@dataclass
class _Entry:
    process: Process
    record: state.ProcessRecord
    ready: asyncio.Event = field(default_factory=asyncio.Event)  # has been ready once
    handle: Handle | None = None


class Supervisor:
    """`on_change` is called with the deployment after every change of it (a view prints from there)."""

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        settings: Settings | None = None,
        on_change: Callable[[state.Deployment], None] = lambda _: None,
    ) -> None:
        self.backend, self.settings, self.on_change = backend, settings or Settings(), on_change
        self._stop = asyncio.Event()
        self._failure: BaseException | None = None
        self._entries = {p.name: _Entry(p, _record(p)) for p in plan.processes}
        self.deployment = state.Deployment(
            name=plan.label,
            host=plan.host,
            elsewhere=list(plan.elsewhere),
            backend=getattr(backend, "name", "local"),
            run_dir=str(plan.run_dir),
            topology=plan.topology.source,
            model=plan.context.served_model_name,
            url=plan.url,
            pid=os.getpid(),
            created=created_at(os.getpid()) or time.time(),
            started=time.time(),
            processes=[entry.record for entry in self._entries.values()],
        )

    def stop(self) -> None:
        """Asks `run` to take everything down and return. Called twice: without grace."""
        if self._stop.is_set():
            self.settings = replace(self.settings, stop_grace=0.0, starting_grace=0.0)
        self._stop.set()

    async def run(self) -> None:
        """Returns after a clean stop. Raises StartError when it could not come up, or when nothing useful is left."""
        self._changed()
        # trust_env: a proxy set for the outside world must not stand between us and this machine's processes.
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as self._http:
            tasks = [asyncio.create_task(self._guard(entry)) for entry in self._entries.values()]
            try:
                await self._stop.wait()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._take_down()
        if self._failure:
            raise self._failure

    async def _guard(self, entry: _Entry) -> None:
        """A failure in one task is the deployment's: noted, and everything is taken down."""
        try:
            await self._keep(entry)
        except Exception as error:  # noqa: BLE001 - raised again by run()
            self._failure = self._failure or error
            self.deployment.error = self.deployment.error or str(error)
            self._stop.set()

    # --- one process ----------------------------------------------------------------------------------------------

    async def _keep(self, entry: _Entry) -> None:
        """From waiting to ready, and again after each death, until it is given up."""
        for name in entry.process.depends:
            await self._entries[name].ready.wait()
        for other in entry.process.awaits:
            await self._until_there(entry, other)
        deaths = 0
        while True:
            begun = time.monotonic()
            problem = await self._once(entry)
            lived = time.monotonic() - begun
            if not entry.ready.is_set():
                self._sweep(entry)
                self._set(entry, "failed", problem)
                raise StartError(self._explain(entry, f"could not start: {problem} after {lived:.0f} s"))
            deaths = 1 if lived > self.settings.steady_after else deaths + 1
            if deaths > len(self.settings.backoff):
                self._sweep(entry)
                self._set(entry, "failed", f"{problem}; {deaths - 1} restarts did not help")
                self._is_anything_left(entry)
                return
            wait = self.settings.backoff[deaths - 1]
            entry.record.restarts += 1
            self._set(entry, "restarting", f"{problem}; again in {wait:g} s")
            await asyncio.sleep(wait)

    async def _until_there(self, entry: _Entry, other: Elsewhere) -> None:
        """Waits for a process of another host, as long as it may take to start. Raises StartError."""
        deadline = time.monotonic() + other.start_timeout
        self._set(entry, "waiting", f"for {other.name} on host {other.host}")
        while not await self._answers(other.ready_url):
            if time.monotonic() > deadline:
                problem = f"{other.name} on host {other.host} was not ready within {other.start_timeout:g} s"
                self._set(entry, "failed", problem)
                fix = f"Is `pdserve launch --host {other.host}` running there, and is {other.url} reachable from here?"
                raise StartError(f"{entry.process.name} cannot start: {problem}. {fix}")
            await asyncio.sleep(self.settings.watch_every)
        self._set(entry, "waiting", "")

    async def _once(self, entry: _Entry) -> str:
        """One life: start, ready, death. Returns what ended it; no process of it is left afterwards. What it keeps for its
        next life, such as the cache's memory and journal, stays."""
        try:
            entry.handle = handle = self.backend.start(entry.process)
        except StartError as error:
            return str(error)
        entry.record.pid, entry.record.created, entry.record.exit_code = handle.pid, handle.created, None
        self._set(entry, "starting", "")
        problem = await self._until_ready(entry, handle)
        if not problem:
            entry.ready.set()
            self._set(entry, "ready", "")
            problem = await self._until_death(entry, handle)
            self._set(entry, "restarting", f"{problem}; ending its children")
        await asyncio.to_thread(self.backend.kill, handle)
        return problem

    async def _until_ready(self, entry: _Entry, handle: Handle) -> str:
        """ "" once it is ready, else why it will not be."""
        deadline = time.monotonic() + entry.process.start_timeout
        while time.monotonic() < deadline:
            if problem := self._death(entry, handle):
                return problem
            # Asked twice: what answers could be a stranger on the port that our process just died of.
            if await self._is_ready(entry.process) and not self._death(entry, handle):
                return ""
            await asyncio.sleep(self.settings.probe_every)
        return f"not ready within its {entry.process.start_timeout:g} s"

    async def _until_death(self, entry: _Entry, handle: Handle) -> str:
        missed, next_probe = 0, time.monotonic() + self.settings.watch_every
        while True:
            if problem := self._death(entry, handle):
                return problem
            if time.monotonic() >= next_probe:
                missed = 0 if await self._is_ready(entry.process) else missed + 1
                next_probe = time.monotonic() + self.settings.watch_every
                # Only said, never killed for it: an engine deep in a long step answers late and is still right.
                if missed == self.settings.unhealthy_after:
                    self._set(entry, "unhealthy", f"{entry.process.ready_url} does not answer")
                elif missed == 0 and entry.record.state == "unhealthy":
                    self._set(entry, "ready", "")
            await asyncio.sleep(self.settings.probe_every)

    def _death(self, entry: _Entry, handle: Handle) -> str:
        code = self.backend.exit_code(handle)
        entry.record.exit_code = code
        return "" if code is None else _exit_words(code)

    async def _is_ready(self, process: Process) -> bool:
        """Asked from here, or by the backend where the process may listen on another machine's loopback."""
        ask = getattr(self.backend, "answers", None)
        return await asyncio.to_thread(ask, process) if ask else await self._answers(process.ready_url)

    async def _answers(self, url: str) -> bool:
        try:
            return (await self._http.get(url)).status_code == 200
        except httpx.HTTPError:
            return False

    def _is_anything_left(self, given_up: _Entry) -> None:
        """Without the cache or one of several engines the rest still answers; without these nothing does."""
        engines = [e for e in self._entries.values() if e.process.role not in ("cache", "proxy")]
        if given_up.process.role == "proxy" or all(e.record.state == "failed" for e in engines):
            raise StartError(self._explain(given_up, f"was given up: {given_up.record.detail}"))

    def _explain(self, entry: _Entry, problem: str) -> str:
        log = entry.process.log
        why, last = logtail.cause(log), logtail.tail(log)
        fix = remedies.remedy(problem, why, last)
        lines = "".join(f"\n    {line}" for line in last)
        ending = f"\n  the end of {log}:{lines}" if lines else f"; {log} is empty"
        told = f"{entry.process.name} {problem}" + (f": {why}" if why else "")
        return told + (f"\n  fix: {fix}" if fix else "") + ending

    # --- stopping -------------------------------------------------------------------------------------------------

    async def _take_down(self) -> None:
        self.deployment.state = "stopping"
        self._changed()
        for roles in STOP_ORDER:
            ends = (self._end(e) for e in self._entries.values() if e.process.role in roles)
            for problem in await asyncio.gather(*ends, return_exceptions=True):
                if isinstance(problem, BaseException):  # one that does not go must not keep the others
                    self._failure = self._failure or problem
                    self.deployment.error = self.deployment.error or str(problem)
        self.deployment.state = "failed" if self._failure else "stopped"
        self._changed()

    async def _end(self, entry: _Entry) -> None:
        handle, detail = entry.handle, ""
        starting = entry.record.state == "starting"
        if handle is not None:
            if entry.record.state != "failed":
                self._set(entry, "stopping", "")
            self.backend.interrupt(handle)
            begun = time.monotonic()
            while self.backend.exit_code(handle) is None:
                grace = self.settings.starting_grace if starting else self.settings.stop_grace
                if time.monotonic() - begun >= grace:
                    detail = "" if starting else "did not end by itself and was killed"
                    break
                await asyncio.sleep(0.05)
            await asyncio.to_thread(self.backend.kill, handle)
            entry.record.exit_code = self.backend.exit_code(handle)
            self._sweep(entry)
        if entry.record.state != "failed":
            self._set(entry, "stopped", detail)

    def _sweep(self, entry: _Entry) -> None:
        """A process that died by force leaves its socket and its shared memory behind."""
        remove = getattr(self.backend, "remove", None)
        if remove is not None:
            remove(entry.process)
            return
        for path in entry.process.leftovers:
            leftovers.remove(path)

    # --- telling --------------------------------------------------------------------------------------------------

    def _set(self, entry: _Entry, to: state.ProcessState, detail: str) -> None:
        record = entry.record
        if record.state != to:
            record.state, record.since = to, time.time()
        record.detail = detail
        if to in ("failed", "stopped", "restarting"):
            record.pid = None
        self._changed()

    def _changed(self) -> None:
        all_ready = all(record.state == "ready" for record in self.deployment.processes)
        if self.deployment.state in ("starting", "degraded") and all_ready:
            self.deployment.state = "ready"
        elif self.deployment.state == "ready" and not all_ready:
            self.deployment.state = "degraded"
        # A full disk or a closed terminal must not keep us from taking processes down.
        with contextlib.suppress(OSError):
            state.write(self.deployment)
        with contextlib.suppress(OSError):
            self.on_change(self.deployment)


def _record(process: Process) -> state.ProcessRecord:
    return state.ProcessRecord(
        name=process.name,
        role=process.role,
        host=process.host,
        url=process.url,
        ready_url=process.ready_url,
        log=str(process.log),
        since=time.time(),
        leftovers=[str(path) for path in process.leftovers],
    )


def _exit_words(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"

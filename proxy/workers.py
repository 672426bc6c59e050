"""Several worker processes on one port, and a restart that drops nothing. The parent serves nothing itself.

It binds one socket a worker (SO_REUSEPORT: the kernel spreads new connections over them) and keeps them open: a worker
inherits its socket, and so does the one that replaces it, so that no connection waiting to be accepted is lost.

    SIGHUP            new workers are started one by one; when one serves, the one before it finishes its streams and goes
    SIGTERM, SIGINT   all are stopped in order
    a worker dies     another takes its place, after a pause that grows while that goes on happening
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import multiprocess

from pdserve import log
from pdserve.proxy import shared

READY_WITHIN = 60.0
STEADY_AFTER = 120.0  # seconds that a worker has lived: earlier deaths are forgotten
TICK = 0.05
_log = log.get("proxy.workers")

# How a worker knows what it is: set by the parent, not by people.
ROW, FOLDER, DESCRIPTOR = "PDSERVE_PROXY_WORKER", "PDSERVE_PROXY_SHARED", "PDSERVE_PROXY_SOCKET"


@dataclass(frozen=True, slots=True)
class Role:
    """What a worker is told by its parent."""

    row: int
    folder: Path
    descriptor: int

    def tell_ready(self) -> None:
        (self.folder / f"ready-{os.getpid()}").touch()


def role() -> Role | None:
    """This process's, if it is a worker."""
    row = os.environ.get(ROW)
    return None if row is None else Role(int(row), Path(os.environ[FOLDER]), int(os.environ[DESCRIPTOR]))


class Parent:
    def __init__(self, count: int, bind: Callable[[], socket.socket], stop_within: float, drain_within: float) -> None:
        self._stop_within, self._drain_within = stop_within, drain_within
        self._sockets = [bind() for _ in range(count)]
        self._folder = Path(tempfile.mkdtemp(prefix="pdserve-proxy-"))
        (self._folder / "metrics").mkdir()
        self._workers: list[subprocess.Popen[bytes] | None] = [None] * count
        self._leaving: list[tuple[subprocess.Popen[bytes], float]] = []
        self._died = [0] * count
        self._again, self._since = [0.0] * count, [0.0] * count
        self._rows: dict[int, int] = {}  # of the workers that live, by their process ids
        self._stopping = self._restart = False

    @property
    def port(self) -> int:
        return int(self._sockets[0].getsockname()[1])

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "_stopping", True))
        signal.signal(signal.SIGHUP, lambda *_: setattr(self, "_restart", True))
        try:
            for slot in range(len(self._workers)):
                self._workers[slot] = self._start(slot)
            if not all(self._ready(worker) for worker in self._workers if worker is not None):
                return 1
            _log.info("%d workers on port %d", len(self._workers), self.port)
            while not self._stopping:
                self._look_after()
                time.sleep(TICK)
            return 0
        finally:
            self._stop_all()
            shutil.rmtree(self._folder, ignore_errors=True)
            for bound in self._sockets:
                bound.close()

    def _start(self, slot: int) -> subprocess.Popen[bytes]:
        row = next((row for row in range(shared.ROWS) if row not in self._rows.values()), 0)
        descriptor = self._sockets[slot].fileno()
        told = {ROW: str(row), FOLDER: str(self._folder), DESCRIPTOR: str(descriptor),
                "PROMETHEUS_MULTIPROC_DIR": str(self._folder / "metrics")}  # fmt: skip
        command = [sys.executable, *sys.orig_argv[1:]]
        worker = subprocess.Popen(command, env={**os.environ, **told}, pass_fds=[descriptor])
        self._rows[worker.pid], self._since[slot] = row, time.monotonic()
        return worker

    def _gone(self, worker: subprocess.Popen[bytes]) -> None:
        """What it counted ends with it: its requests are no load any more, and take no place of a key's."""
        shared.clear(self._folder, self._rows.pop(worker.pid))
        multiprocess.mark_process_dead(worker.pid, str(self._folder / "metrics"))

    def _ready(self, worker: subprocess.Popen[bytes]) -> bool:
        end = time.monotonic() + READY_WITHIN
        while time.monotonic() < end and worker.poll() is None and not self._stopping:
            if (self._folder / f"ready-{worker.pid}").exists():
                return True
            time.sleep(TICK)
        return False

    def _look_after(self) -> None:
        now = time.monotonic()
        for slot, worker in enumerate(self._workers):
            if worker is not None and worker.poll() is not None:
                self._died[slot] = 1 if now - self._since[slot] > STEADY_AFTER else self._died[slot] + 1
                self._again[slot] = now + min(30.0, 0.1 * 2 ** self._died[slot])
                self._workers[slot] = None
                self._gone(worker)
                _log.warning("worker %d ended with %s; another takes its place", worker.pid, worker.returncode)
            if self._workers[slot] is None and now >= self._again[slot]:
                self._workers[slot] = self._start(slot)
        for old, end in list(self._leaving):
            if old.poll() is not None:
                self._gone(old)
                self._leaving.remove((old, end))
            elif now > end:
                old.kill()
        if self._restart:
            self._restart = False
            self._replace_all()

    def _replace_all(self) -> None:
        for slot, old in enumerate(self._workers):
            new = self._start(slot)
            if not self._ready(new):
                _log.error("the new worker did not come up; the old ones go on")
                new.kill()
                new.wait()
                self._gone(new)
                return
            self._workers[slot], self._died[slot] = new, 0
            if old is not None:
                old.send_signal(signal.SIGHUP)
                self._leaving.append((old, time.monotonic() + self._drain_within + 5))
        _log.info("all workers are new")

    def _stop_all(self) -> None:
        running = [w for w in self._workers if w is not None] + [old for old, _ in self._leaving]
        for worker in running:
            with contextlib.suppress(ProcessLookupError):
                worker.terminate()
        end = time.monotonic() + self._stop_within + 5
        for worker in running:
            try:
                worker.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()

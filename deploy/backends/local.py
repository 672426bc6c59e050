"""Processes on this machine, each leading a session of its own, so that its children are found after its death."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from pdserve.deploy.backends.base import Handle
from pdserve.deploy.plan import Process
from pdserve.errors import StartError

MARKER = "PDSERVE_DEPLOYMENT"  # set to the run directory in every process we start; children inherit it
LOG_HEAD = "--- pdserve: "
CHILDREN_SECONDS = 5.0  # for the children of a process that is gone to end by themselves
_PR_SET_PDEATHSIG = 1
_SAME_AGE = 2.0  # seconds; start times are counted from a boot time that a clock correction can move a little
_libc = ctypes.CDLL(None, use_errno=True)


class LocalBackend:
    """Fits backends/base.py. Children get SIGTERM from the kernel when the supervisor dies, however it dies."""

    def __init__(self, children_seconds: float = CHILDREN_SECONDS) -> None:
        self._children_seconds = children_seconds
        self._started: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, process: Process) -> Handle:
        for folder in (process.log.parent, *process.folders):
            folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **process.env, MARKER: str(process.cwd)}
        with process.log.open("ab") as log:
            log.write(f"{LOG_HEAD}{time.strftime('%Y-%m-%d %H:%M:%S')} {process.shell()}\n".encode())
            log.flush()
            try:
                child = subprocess.Popen(
                    process.argv,
                    env=environment,
                    cwd=process.cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=_die_with(os.getpid()),
                )
            except OSError as error:
                raise StartError(f"{process.name} cannot be started: {process.argv[0]}: {error.strerror}.") from error
        self._started[child.pid] = child
        return Handle(process.name, child.pid, created_at(child.pid) or time.time())

    def exit_code(self, handle: Handle) -> int | None:
        child = self._started.get(handle.pid)
        return child.poll() if child else -signal.SIGKILL

    def interrupt(self, handle: Handle) -> None:
        if self.exit_code(handle) is None:
            os.kill(handle.pid, signal.SIGTERM)

    def kill(self, handle: Handle) -> None:
        self.exit_code(handle)  # takes the zombie away, here and below
        end_session(handle.pid, handle.created, self._children_seconds)
        self.exit_code(handle)

    def remains(self, handle: Handle) -> list[int]:
        self.exit_code(handle)
        return session_members(handle.pid, handle.created)


def _die_with(parent: int) -> Callable[[], None]:
    """Runs in the child between fork and exec: asks the kernel for SIGTERM at the parent's death."""

    def ask() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask


def created_at(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def is_running(pid: int, created: float) -> bool:
    """Whether this very process lives; a zombie does not."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created) < _SAME_AGE and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def session_members(sid: int, created: float) -> list[int]:
    """Live processes of the session that a process started at `created` with pid `sid` leads or led.

    While a session has members its id is not given to a new process, so members without a leader are ours; a leader of
    another age means that the session is gone and the number was used again. 0 is what the kernel says of a session
    begun outside this container, so it names no session at all.
    """
    if sid <= 0:
        return []
    leader = created_at(sid)
    if leader is not None and abs(leader - created) >= _SAME_AGE:
        return []
    return [pid for pid in psutil.pids() if _session_of(pid) == sid and not _is_zombie(pid)]


def end_session(sid: int, created: float, seconds: float = CHILDREN_SECONDS) -> list[int]:
    """Ends all that is left of a session: asked first, killed after `seconds`. Returns what cannot be killed.

    Asking matters: an engine's workers and Python's resource tracker then remove their shared memory by themselves.
    What they leave all the same is removed here.
    """
    members = session_members(sid, created)
    if not members:
        return []
    shared = _shared_memory_of(members)
    for pid in members:
        _send(pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while members and time.monotonic() < deadline:
        time.sleep(0.05)
        members = session_members(sid, created)
    stuck = kill_all(members)
    left = {path for path in shared if path.exists()}
    for path in left - _shared_memory_of(psutil.pids()) if left else ():
        path.unlink(missing_ok=True)
    return stuck


# Names that Python's multiprocessing gives to shared memory and semaphores.
_ANONYMOUS = re.compile(r"(/dev/shm/(?:psm_\w+|sem\.\w+-\w+))")


def _shared_memory_of(pids: list[int]) -> set[Path]:
    """Unnamed (by a human) shared memory that these processes have mapped."""
    found: set[str] = set()
    for pid in pids:
        try:
            found.update(_ANONYMOUS.findall(Path(f"/proc/{pid}/maps").read_text()))
        except OSError:
            continue  # gone, or another user's
    return {Path(path) for path in found}


def marked(run_dir: str) -> list[int]:
    """Live processes that carry our marker for this run directory (all but those that overwrote their environment)."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == run_dir and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue  # gone, or another user's
    return [pid for pid in found if pid != os.getpid()]


def kill_all(pids: list[int], seconds: float = 5.0) -> list[int]:
    """SIGKILL, then waits until they are gone; returns those that are not (stuck in the kernel)."""
    for pid in pids:
        _send(pid, signal.SIGKILL)
    deadline = time.monotonic() + seconds
    alive = list(pids)
    while alive and time.monotonic() < deadline:
        alive = [pid for pid in alive if psutil.pid_exists(pid) and not _is_zombie(pid)]
        time.sleep(0.02 if alive else 0)
    return alive


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True

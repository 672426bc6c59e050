"""What the supervisor tells the world: state.json in the run directory, replaced as a whole on every change."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO, Literal

import msgspec

from pdserve import env
from pdserve.deploy.backends.local import is_running
from pdserve.deploy.hosts import Elsewhere

FILE = "state.json"

ProcessState = Literal["waiting", "starting", "ready", "unhealthy", "restarting", "failed", "stopping", "stopped"]
DeploymentState = Literal["starting", "ready", "degraded", "stopping", "stopped", "failed"]


class ProcessRecord(msgspec.Struct):
    name: str
    role: str
    url: str
    ready_url: str
    log: str
    state: ProcessState = "waiting"
    detail: str = ""
    pid: int | None = None
    created: float = 0.0
    restarts: int = 0
    exit_code: int | None = None
    since: float = 0.0  # when it came into this state
    leftovers: list[str] = []
    host: str = ""  # where there are several


class Deployment(msgspec.Struct):
    name: str
    run_dir: str
    topology: str
    model: str
    url: str
    pid: int
    created: float
    started: float
    state: DeploymentState = "starting"
    error: str = ""
    processes: list[ProcessRecord] = []
    host: str = ""  # where there are several
    elsewhere: list[Elsewhere] = []  # what runs on the others
    backend: str = "local"  # pids are this machine's only then

    def supervisor_alive(self) -> bool:
        return is_running(self.pid, self.created)

    def of(self, name: str) -> ProcessRecord:
        return next(record for record in self.processes if record.name == name)


def write(deployment: Deployment) -> None:
    path = Path(deployment.run_dir) / FILE
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_bytes(msgspec.json.format(msgspec.json.encode(deployment), indent=1))
    scratch.replace(path)


def read(run_dir: Path) -> Deployment | None:
    """None when there is none, or when it was written by a version with another format."""
    try:
        return msgspec.json.decode((run_dir / FILE).read_bytes(), type=Deployment)
    except (OSError, msgspec.MsgspecError):
        return None


def read_all() -> list[Deployment]:
    found = [read(path.parent) for path in sorted(env.run_root().glob(f"*/{FILE}"))]
    return [deployment for deployment in found if deployment]


def lock(run_dir: Path, seconds: float = 0.0) -> IO[str] | None:
    """Held by the one supervisor of a deployment for as long as it lives; None when another one holds it."""
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = (run_dir / "lock").open("a")
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                return None
            time.sleep(0.1)

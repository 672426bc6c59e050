"""Shared fixtures: a real cache daemon in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


class RunningCache:
    """A daemon in a process of its own, through the command's own entry."""

    def __init__(self, folder: Path, name: str, size: int = 64 << 20, *words: str) -> None:
        self.socket, self.port, self.name = folder / "c.sock", free_port(), name
        self.log = folder / f"{name}.log"
        argv = [
            "cache",
            "serve",
            "--socket",
            str(self.socket),
            "--size",
            str(size),
            "--admin-port",
            str(self.port),
            "--name",
            name,
            *words,
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-P", "-m", "pdserve", *argv], stderr=log)
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                self.get("/healthz")
                return
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "the daemon did not come up"
            time.sleep(0.05)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as r:
            return r.read().decode()

    def status(self) -> dict:
        return json.loads(self.get("/status"))

    def stop(self, number: int = signal.SIGTERM) -> str:
        """Ends it, if it still runs, and returns what it logged."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(20)
        return self.log.read_text()


@pytest.fixture
def start_cache() -> Iterator[Callable[..., RunningCache]]:
    """Starts a daemon: start_cache(folder, name, size, *words of the command). What a test does not stop itself ends with the test."""
    started: list[RunningCache] = []

    def start(*args: Any, **kw: Any) -> RunningCache:
        started.append(RunningCache(*args, **kw))
        return started[-1]

    yield start
    for running in started:
        running.stop()
        Path(f"/dev/shm/pdserve-{running.name}.arena").unlink(missing_ok=True)


@pytest.fixture
def cache_daemon(tmp_path: Path, start_cache: Callable[..., RunningCache]) -> RunningCache:
    return start_cache(tmp_path, f"test-{os.getpid()}-{time.monotonic_ns()}")

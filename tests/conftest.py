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

import pytest


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


class RunningCache:
    """A daemon in a process of its own, through the command's own entry."""

    def __init__(self, folder: Path, name: str, size: int = 64 << 20) -> None:
        self.socket, self.port, self.name = folder / "c.sock", free_port(), name
        code = (
            "import argparse,sys\nfrom pdserve.transfer import daemon\n"
            f"sys.exit(daemon.main(argparse.Namespace(socket={str(self.socket)!r},size={size},chunk_tokens=256,admin_host='127.0.0.1',admin_port={self.port},name={name!r})))"
        )
        self.process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                self.get("/healthz")
                return
            if self.process.poll() is not None:
                raise AssertionError(self.process.communicate(timeout=5)[1])
            assert time.monotonic() < deadline, "the daemon did not come up"
            time.sleep(0.05)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as r:
            return r.read().decode()

    def status(self) -> dict:
        return json.loads(self.get("/status"))

    def stop(self, number: int = signal.SIGTERM) -> str:
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, err = self.process.communicate(timeout=20)
        return err


@pytest.fixture(scope="session")
def start_cache() -> Callable[..., RunningCache]:
    """Starts a daemon: start_cache(folder, name, size). The caller stops it."""
    return RunningCache


@pytest.fixture
def cache_daemon(tmp_path: Path) -> Iterator[RunningCache]:
    running = RunningCache(tmp_path, f"test-{os.getpid()}-{time.monotonic_ns()}")
    yield running
    running.stop()
    Path(f"/dev/shm/pdserve-{running.name}.arena").unlink(missing_ok=True)

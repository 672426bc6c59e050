"""A cache daemon in a process of its own, through the command's own entry: for tests, benchmarks and soaks alike."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from ports import free_port

START_S = 120.0


class RunningCache:
    """The daemon `name`, its socket and log in `folder`; `words` go to the command as they are. Call stop() in the end."""

    def __init__(
        self, folder: Path, name: str, size: int = 64 << 20, *words: str, env: dict[str, str] | None = None
    ) -> None:
        self.socket, self.port, self.name = folder / "c.sock", free_port(), name
        self.log = folder / f"{name}.log"
        argv = ["--socket", str(self.socket), "--size", str(size), "--admin-port", str(self.port), "--name", name]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pdserve", "cache", "serve", *argv, *words],
                stderr=log,
                env={**os.environ, **(env or {})},
            )
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                self.get("/healthz")
                return
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "the daemon did not come up"
            time.sleep(0.05)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as r:
            return r.read().decode()

    def status(self) -> dict:
        return json.loads(self.get("/status"))

    def cpu_seconds(self) -> float:
        """Processor time that the daemon has used, in itself and in the kernel."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def weight(self) -> tuple[int, int]:
        """(KiB of memory of its own, open files)."""
        proc = Path(f"/proc/{self.process.pid}")
        line = next(x for x in (proc / "status").read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]), len(list((proc / "fd").iterdir()))

    def stop(self, number: int = signal.SIGTERM) -> str:
        """Ends it, if it still runs, and returns what it logged."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(60)
        return self.log.read_text()

"""Small real processes in place of engines: an HTTP server in a few lines, with children, that can be told to misbehave."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ports import free_port

from pdserve import topology
from pdserve.deploy.backends.local import kill_all, marked
from pdserve.deploy.plan import Plan, Process
from pdserve.launching import Context
from pdserve.model import Model

SERVER = """
import os, sys, time
port, mode, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if mode == "exit":
    print("ValueError: no such weights"); print("RuntimeError: Engine core initialization failed."); sys.exit(3)
if mode == "silent":
    print("still loading", flush=True); time.sleep(600)
if mode == "once" and os.path.exists(folder + "/died"):
    print("OSError: it does not come back"); sys.exit(4)
import http.server, subprocess
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if mode == "deaf":
    import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            open(folder + "/died", "w").close(); os._exit(7)
        sick = os.path.exists(folder + "/sick")
        self.send_response(503 if sick else 200); self.end_headers()
    def log_message(self, *_): pass
print("serving", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""

Make = Callable[..., Plan]


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """The run directory of a deployment; fails the test when a process of it outlives it."""
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    yield folder
    left = marked(str(folder))
    kill_all(left)
    assert not left, "processes outlived the test"


@pytest.fixture
def make_plan(run_dir: Path) -> Make:
    """make_plan(cache="ok", engine="exit", ...): one process per role, each in a mode of the server above."""

    def make(start_timeout: float = 120.0, **modes: str) -> Plan:
        processes = []
        for name, mode in modes.items():
            role = {"cache": "cache", "proxy": "proxy"}.get(name, "both")
            port = free_port()
            before = {"cache": (), "proxy": tuple(n for n in modes if n != "proxy")}
            arena = run_dir / f"{name}.arena"
            processes.append(
                Process(
                    name=name,
                    role=role,
                    argv=(sys.executable, "-c", SERVER, str(port), mode, str(run_dir)),
                    env={"PYTHONSAFEPATH": "1"},
                    url=f"http://127.0.0.1:{port}",
                    ready_url=f"http://127.0.0.1:{port}/health",
                    log=run_dir / "logs" / f"{name}.log",
                    cwd=run_dir,
                    depends=before.get(name, ("cache",) if "cache" in modes else ()),
                    start_timeout=start_timeout,
                    leftovers=(arena,),
                )
            )
        top = topology.parse("name: small\nmodel: demo\nengine: {device: cpu}\nplain: [{port: 18300}]\n")
        context = Context(Model("demo", "demo", True), "demo", sys.executable, run_dir, None)
        return Plan(top, context, run_dir, tuple(processes), top)

    return make


def session_of(pid: int) -> list[int]:
    """The process and its children, as they are now."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]

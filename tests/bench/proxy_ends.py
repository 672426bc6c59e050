"""What bench_proxy.py starts and reads: processes of engines, proxies and the router, their memory and processor time, and
limits to the processor time that some of them may have."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

PROXY = "import sys; from pdserve.proxy import app, options; import argparse as a; p = a.ArgumentParser(); " \
    "app.add_arguments(p); sys.exit(app.main(p.parse_args()))"  # fmt: skip
CPU_GROUPS = Path("/sys/fs/cgroup/cpu")  # cgroup v1; in v2 a quota is in cpu.max
PERIOD_US = 10_000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Processes:
    """The processes of a run; all are gone when the block is left."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait(20)

    def engine(self, **flags: object) -> str:
        port = free_port()
        words = [w for key, value in flags.items() for w in (f"--{key}", str(value))]
        return self._start(["-m", "pdserve.engines.fake.server", "--port", str(port), *words], port)

    def proxy(self, *words: str) -> str:
        port = free_port()
        return self._start(["-c", PROXY, "--port", str(port), *words], port)

    def rust_router(self, producer: str, consumer: str) -> str | None:
        """vllm-router in its PD mode, where it is installed: the neighbour to be measured against."""
        places = (Path(sys.executable).parent / "vllm-router", Path(os.environ.get("VLLM_ROUTER", "/nowhere")))
        binary = next((place for place in places if place.exists()), None)
        if binary is None:
            return None
        port = free_port()
        words = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
        words += ["--vllm-pd-disaggregation", "--kv-connector", "nixl", "--policy", "round_robin"]
        return self._start([*words, "--prefill", producer, "--decode", consumer], port, str(binary))

    def _start(self, words: list[str], port: int, program: str = sys.executable) -> str:
        quiet = {**os.environ, "PDSERVE_LOG_LEVEL": "error"}
        out = subprocess.DEVNULL
        self.running.append(subprocess.Popen([program, *words], stdout=out, stderr=out, env=quiet))
        url = f"http://127.0.0.1:{port}"
        for _ in range(400):
            with contextlib.suppress(OSError, httpx.HTTPError):
                if httpx.get(url + "/health").status_code == 200:
                    return url
            time.sleep(0.05)
        raise SystemExit(f"{words} did not come up")


def children(pid: int) -> list[int]:
    """A process's, or the process itself if it has none."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found] or [pid]


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu(pid: int) -> float:
    """Seconds of processor time of a process, all its threads together, to the nanosecond (of /proc/PID/stat: ticks of 10 ms)."""
    found = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends
            found += int((task / "schedstat").read_text().split()[0])
    return found / 1e9


@contextlib.contextmanager
def limited(pids: Sequence[int], share: float) -> Iterator[bool]:
    """While it is entered the kernel gives each of these processes `share` of one core and no more. False: it cannot be
    asked to here (no cgroup v1 with quotas, or no right to make one)."""
    made: list[Path] = []
    try:
        try:
            for pid in pids:
                group = CPU_GROUPS / f"pdserve-bench-{os.getpid()}-{pid}"
                group.mkdir()
                made.append(group)
                (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (group / "cpu.cfs_quota_us").write_text(str(int(share * PERIOD_US)))
                (group / "cgroup.procs").write_text(str(pid))
        except OSError:
            yield False
        else:
            yield True
    finally:
        for group in made:
            for pid_ in (group / "cgroup.procs").read_text().split():
                (CPU_GROUPS / "cgroup.procs").write_text(pid_)
            group.rmdir()

"""A machine that stalls: runs a command, and stops all processes that come of it for a while, now and then.

python tests/support/stall.py [--every 3] [--most 2.5] [--seed N] .venv/bin/pytest tests/proxy

A test that fails only here relies on how fast the machine is. (One that stops a process itself may find it continued.)
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

NAME = "PDSERVE_STALLED_BY"


def marked(mark: bytes) -> list[int]:
    """Also those that have left their parent: children have their parents' environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def send(pids: list[int], what: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, what)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two stalls, on average")
    parser.add_argument("--most", type=float, default=2.5, help="seconds that the longest take")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    mark, rng = f"{os.getpid()}-{time.time_ns()}", random.Random(args.seed)
    process = subprocess.Popen(args.command, env=os.environ | {NAME: mark})
    stalls = 0
    while process.poll() is None:
        time.sleep(rng.uniform(0.2, 2 * args.every))
        stopped = marked(f"{NAME}={mark}".encode())
        try:
            send(stopped, signal.SIGSTOP)
            time.sleep(rng.choice([0.3, 0.7, 1.2, args.most]))
        finally:  # what was started while they were being stopped, too
            send([*stopped, *marked(f"{NAME}={mark}".encode())], signal.SIGCONT)
        stalls += 1
    print(f"{stalls} stalls", file=sys.stderr)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())

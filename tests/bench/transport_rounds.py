"""What the ends of bench_transports.py have in common: sizes, what they print, and the measuring of rounds."""

from __future__ import annotations

import json
import os
import resource
import statistics
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pdserve.transfer import arena

MIB = 1 << 20
SIZES = (1 * MIB, 8 * MIB, 32 * MIB)
ARENA = 512 * MIB  # more than the processor's caches hold
ROUND = 256 * MIB
ROUNDS = 5


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def shared_arena(huge: bool = True) -> np.ndarray:
    """A daemon's arena, gone with this process; `huge`: in such pages if the kernel gives them, as a daemon's is."""
    if not huge:
        arena.huge_page = lambda: 0
    path = arena.path_for(f"bench-{os.getpid()}")
    try:
        memory = arena.create(path, ARENA).bytes
    finally:
        path.unlink(missing_ok=True)
    memory.view(np.uint64)[:] = np.random.default_rng(1).integers(0, 2**63, ARENA // 8, np.uint64)
    return memory


#: what a receiver of bare loops answers when a round is there: its own CPU seconds
ACK = struct.Struct("d")


def until_stdin_ends() -> None:
    sys.stdin.read()


def measured(size: int, once: Callable[[], float]) -> None:
    """Runs `once` (one round of this size; returns the other end's CPU seconds so far) several times and says the median."""
    theirs = once()
    speeds = []
    mine = cpu()
    latest = theirs
    for _ in range(ROUNDS):
        start = time.perf_counter()
        latest = once()
        speeds.append(ROUND / (time.perf_counter() - start) / 1e9)
    say_speed(size, speeds, cpu() - mine + latest - theirs)


def say_speed(size: int, speeds: list[float], used: float) -> None:
    say(size=size, gbs=statistics.median(speeds), cpu_per_gb=used / (len(speeds) * ROUND / 1e9))

"""Shared fixtures: a real cache daemon in a process of its own."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "support"))  # benchmarks use the same helper

from running_cache import RunningCache


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

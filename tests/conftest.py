"""Shared fixtures: a real cache daemon in a process of its own. And what makes a busy machine no reason to fail."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent / "support"))  # benchmarks use the same helper

from reruns import pytest_runtest_setup, pytest_sessionfinish, pytest_terminal_summary  # noqa: F401 - hooks
from running_cache import RunningCache

from pdserve.transfer import client

# How long an example takes says nothing here. The same examples each time: a run that fails can be repeated, and one
# that passed passes again; `--hypothesis-profile random` looks further.
_PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("same", settings(derandomize=True, database=None, **_PATIENT))
settings.register_profile("random", settings(print_blob=True, **_PATIENT))
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _patient_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that starts, or that gets no processor for a while, is slow and not gone."""
    monkeypatch.setattr(client, "CONNECT_S", 20.0)


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

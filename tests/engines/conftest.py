"""The two halves of the connector. What imports vLLM is imported where it is asked for: other tests here do without."""

import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def world(monkeypatch):
    """The scheduler's half, over an index of its own."""
    import scheduler_world

    from pdserve.engines.vllm import finding

    monkeypatch.setattr(finding, "MIN_TOKENS", 2)
    return scheduler_world.make()


@pytest.fixture
def patient(monkeypatch):
    """A daemon that gets no processor for a while is slow and not gone."""
    from pdserve.engines.vllm import copier, loading, saving

    for module in (copier, loading, saving):
        monkeypatch.setattr(module, "RPC_S", 60.0)


@pytest.fixture
def engines(cache_daemon):
    """Makes workers over one daemon."""
    from worker_engines import Engine

    made = []

    def make(**kw):
        made.append(Engine(cache_daemon.socket, **kw))
        return made[-1]

    yield make
    for e in made:
        e.side.close()
    ends = time.monotonic() + 60
    while left := [t.name for t in threading.enumerate() if t.name.startswith("pdserve-")]:
        assert time.monotonic() < ends, left
        time.sleep(0.02)

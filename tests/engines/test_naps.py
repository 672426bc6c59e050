"""vLLM's naps between steps that compute nothing, and the end of a load."""

import importlib
import threading
import time

import pytest

pytest.importorskip("vllm", reason="what is changed is vLLM's engine core")
from pdserve.engines.vllm import naps


@pytest.fixture
def clock(monkeypatch):
    """Naps of a minute."""
    monkeypatch.setattr(naps, "NAP_S", 60.0)
    return naps.Clock()


def naps_until(clock, event) -> bool:
    """Whether a nap goes on until `event` happens."""
    over = threading.Event()
    napping = threading.Thread(target=lambda: (clock.sleep(60), over.set()))
    napping.start()
    napped = not over.wait(0.05)
    event()
    assert over.wait(30)
    napping.join(30)
    assert not napping.is_alive()
    return napped


def test_a_load_cuts_three_naps_short_and_no_more(clock):
    clock.ended()
    for _ in range(naps.NAPS):
        clock.sleep(60)
    assert naps_until(clock, clock.ended)  # also one that is under way


def test_once_something_is_computed_the_engine_naps_again(clock):
    clock.ended()
    clock.computed()
    assert naps_until(clock, clock.ended)


def test_what_is_no_nap_is_slept(monkeypatch):
    slept = []
    monkeypatch.setattr(naps.time, "sleep", slept.append)
    clock = naps.Clock()
    clock.ended()
    clock.sleep(5)
    assert slept == [5]
    assert clock.monotonic() <= time.monotonic()


def test_the_engine_core_that_vllm_has_takes_it(monkeypatch):
    core = importlib.import_module("vllm.v1.engine.core")
    monkeypatch.setattr(core, "time", time)
    naps.install()
    naps.install()
    assert core.time is naps.clock

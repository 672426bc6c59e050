"""When a GPU is touched, and by which engines."""

import threading
import time

import pytest

from pdserve.engines.vllm import quick
from pdserve.engines.vllm.quick import FREE_BYTES, Quick, why_not
from pdserve.errors import ConfigError
from pdserve.kernels.second_context import SecondContextError


class Context:
    def __init__(self, fails: bool = False) -> None:
        self.touched, self.closed, self._fails = threading.Semaphore(0), threading.Event(), fails

    def touch(self) -> None:
        self.touched.release()
        if self._fails:
            raise SecondContextError("cuLaunchKernel: gone (4)")

    def close(self) -> None:
        self.closed.set()


def step_until_touched(owner: Quick, context: Context, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        owner.step(True)
        if context.touched.acquire(timeout=0.001):
            return True
    return False


def test_touched_after_something_was_moved_and_while_answers_are_generated(monkeypatch):
    monkeypatch.setattr(quick, "REST_S", 0.01)
    context = Context()
    owner = Quick(context)
    for _ in range(3):
        owner.step(False)
    assert not context.touched.acquire(timeout=0.1), "nobody generates"
    assert step_until_touched(owner, context), "what came before is not known"
    assert not step_until_touched(owner, context, 0.1), "nothing was moved since"
    for _ in range(2):
        owner.used()
        assert step_until_touched(owner, context)
    owner.close()
    assert context.closed.is_set()
    assert not owner._thread.is_alive()


def test_touched_now_and_then_whatever_happens(monkeypatch):
    monkeypatch.setattr(quick, "REST_S", 0.01)
    monkeypatch.setattr(quick, "EVERY_S", 0.05)
    context = Context()
    owner = Quick(context)
    assert all(step_until_touched(owner, context) for _ in range(3))
    owner.close()


def test_closed_while_it_rests():
    context = Context()
    owner = Quick(context)
    owner.step(True)
    assert context.touched.acquire(timeout=10)
    owner.close()
    assert context.closed.is_set()


def test_a_context_that_fails_is_given_up_and_said(caplog):
    context = Context(fails=True)
    owner = Quick(context)
    owner.step(True)
    assert context.closed.wait(10)
    assert "given up" in caplog.text
    assert "gone (4)" in caplog.text
    owner.step(True)
    owner.close()


@pytest.mark.parametrize(
    ("wanted", "role", "capability", "free", "why"),
    [
        (None, "kv_both", (9, 0), FREE_BYTES, ""),
        (None, "kv_consumer", (9, 0), FREE_BYTES, ""),
        (None, "kv_producer", (9, 0), FREE_BYTES, "generates no answers"),
        (None, "kv_both", (8, 0), FREE_BYTES, "nothing is known"),
        (True, "kv_both", (8, 0), FREE_BYTES, ""),
        (True, "kv_both", (9, 0), FREE_BYTES - 1, "only 4.0 GiB"),
        (False, "kv_both", (9, 0), FREE_BYTES, "not wanted"),
    ],
)
def test_which_engines(wanted, role, capability, free, why):
    said = why_not(wanted, role, capability, free)
    assert (why in said) if why else not said


def test_neither_true_nor_false():
    with pytest.raises(ConfigError, match=r"pdserve.second_context: 'yes' is neither true nor false"):
        quick.check("yes")

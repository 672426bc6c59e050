"""What is asked of CUDA's driver for a second context, and that nothing of it stays; on a GPU tests/gpu does it for real."""

import ctypes

import pytest

from pdserve.kernels.second_context import SecondContext, SecondContextError


class Driver:
    """Notes each call; `fails` maps a function to the code that it gives back."""

    def __init__(self, **fails: int) -> None:
        self.calls: list[str] = []
        self._fails = fails
        self.current = ["primary"]

    def __getattr__(self, name: str):
        def call(*arguments):
            self.calls.append(name)
            if code := self._fails.get(name):
                return code
            if name == "cuCtxCreate_v2":
                ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_void_p))[0] = 0xC0DE
                self.current.append("second")
            elif name == "cuCtxPushCurrent_v2":
                assert arguments[0].value == 0xC0DE
                self.current.append("second")
            elif name == "cuCtxPopCurrent_v2":
                self.current.pop()
            elif name == "cuCtxDestroy_v2" and self.current[-1] == "second":
                self.current.pop()  # as CUDA says of a context that is current to the calling thread
            elif name == "cuGetErrorString":
                ctypes.cast(arguments[1], ctypes.POINTER(ctypes.c_char_p))[0] = b"out of memory"
            return 0

        return call


def test_the_threads_own_context_stays_the_current_one():
    driver = Driver()
    context = SecondContext(0, driver)
    assert driver.current == ["primary"]
    context.touch()
    assert driver.current == ["primary"]
    assert driver.calls[-4:] == ["cuCtxPushCurrent_v2", "cuLaunchKernel", "cuStreamSynchronize", "cuCtxPopCurrent_v2"]
    context.close()
    context.close()
    assert driver.calls.count("cuCtxDestroy_v2") == 1


@pytest.mark.parametrize("what", ["cuModuleLoadData", "cuModuleGetFunction", "cuStreamCreate"])
def test_what_fails_half_made_is_taken_down(what):
    driver = Driver(**{what: 2})
    with pytest.raises(SecondContextError, match=rf"{what}: out of memory \(2\)"):
        SecondContext(0, driver)
    assert driver.calls.count("cuCtxDestroy_v2") == 1
    assert driver.current == ["primary"]


def test_no_context_nothing_to_take_down():
    driver = Driver(cuCtxCreate_v2=2)
    with pytest.raises(SecondContextError, match="cuCtxCreate_v2"):
        SecondContext(0, driver)
    assert "cuCtxDestroy_v2" not in driver.calls


def test_a_failed_touch_leaves_the_thread_as_it_was():
    driver = Driver(cuStreamSynchronize=719)
    context = SecondContext(0, driver)
    with pytest.raises(SecondContextError, match="719"):
        context.touch()
    assert driver.current == ["primary"]

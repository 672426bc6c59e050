"""A second CUDA context of a process on a device, in which nothing runs but an empty kernel now and then.

Why anybody would want one: a device that switches between two contexts replays CUDA graphs quicker afterwards (on an H200 each
kernel begins 0.35 us sooner after the one before; docs/measurements.md). A process that has a device to itself never switches.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

from pdserve.kernels.nvrtc import DRIVER

#: for any device of compute capability 5.0 and later: the driver compiles it
_KERNEL = b".version 6.0\n.target sm_50\n.address_size 64\n.visible .entry pd_touch() { ret; }\n\0"
_BLOCKING_SYNC, _NON_BLOCKING = 4, 1


class SecondContextError(Exception):
    """The driver's library is not there, or it refused; the message says which call, and why."""


class SecondContext:
    """`driver`: CUDA's driver library. Takes some 520 MiB of an H200's memory and a fifth of a second to make. The thread that makes
    it keeps its own current context; touch() may be called from any one thread at a time."""

    def __init__(self, device: int, driver: Any = None) -> None:
        self._cuda = driver or _library()
        self._context, self._stream, self._kernel = (ctypes.c_void_p() for _ in range(3))
        self._call("cuInit", 0)
        self._call("cuCtxCreate_v2", ctypes.byref(self._context), _BLOCKING_SYNC, self._ordinal(device))
        self._pop()
        try:
            with self._current():
                module = ctypes.c_void_p()
                self._call("cuModuleLoadData", ctypes.byref(module), _KERNEL)
                self._call("cuModuleGetFunction", ctypes.byref(self._kernel), module, b"pd_touch")
                self._call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)
        except SecondContextError:
            self.close()
            raise

    def touch(self) -> None:
        """The device switches to this context and back; some 0.4 ms of what else runs there. Waits for it: up to a few time slices."""
        with self._current():
            self._call("cuLaunchKernel", self._kernel, 1, 1, 1, 32, 1, 1, 0, self._stream, None, None)
            self._call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """While it is not this thread's current context: the driver would take it off the thread's stack."""
        context, self._context = self._context, ctypes.c_void_p()
        if context:
            self._call("cuCtxDestroy_v2", context)

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._pop()

    def _pop(self) -> None:
        self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _ordinal(self, device: int) -> int:
        handle = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(handle), device)
        return handle.value

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._cuda, name)(*arguments):
            said = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(said))
            raise SecondContextError(f"{name}: {(said.value or b'unknown error').decode()} ({code})")


def _library() -> Any:
    try:
        return ctypes.CDLL(DRIVER)
    except OSError as e:
        raise SecondContextError(str(e)) from e

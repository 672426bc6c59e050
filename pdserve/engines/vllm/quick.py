"""Keeps a GPU quick that an engine has to itself.

Alone on an H200, an engine's decoding steps take 3 to 4 % longer than after the device has switched to another context and back:
each kernel of the CUDA graph begins 0.35 us later, for plain vLLM as for ours, until somebody else uses the device. Plain vLLM then
stays quick; an engine that stores or loads falls back. So after stores and loads, when none is under way any more, the device is
touched in the next step that generates answers: an empty kernel in a second context of this process.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from pdserve import log
from pdserve.errors import ConfigError
from pdserve.kernels.second_context import SecondContext, SecondContextError

#: from one touch to the next, at least: it costs what else runs there 0.4 ms, so that fewer than one step in a hundred feels it
REST_S = 1.0
#: and at most, whatever else made the device slow
EVERY_S = 10.0
#: the only kind of device that this was measured on
CAPABILITY = (9, 0)
#: what must be free on the device before the context is made: itself 0.5 GiB, and vLLM's graphs are still to come
FREE_BYTES = 4 << 30
CLOSE_S = 5.0

_KEY = "kv_connector_extra_config.pdserve.second_context"


class Quick:
    """One thread, which owns the context from here on; it waits for work until close() ends it."""

    def __init__(self, context: SecondContext) -> None:
        self._context = context
        self._wanted, self._closed = threading.Event(), threading.Event()
        self._used, self._touched = True, 0.0
        self._thread = threading.Thread(target=self._run, name="pdserve-quick", daemon=True)
        self._thread.start()

    def step(self, worth: bool) -> None:
        """Called on the engine's thread, each step. `worth`: it generates answers, and nothing is being stored or loaded."""
        if worth and not self._wanted.is_set() and (self._used or time.monotonic() - self._touched > EVERY_S):
            self._used = False
            self._wanted.set()

    def used(self) -> None:
        """Something was stored or loaded. From any thread."""
        self._used = True

    def close(self) -> None:
        self._closed.set()
        self._wanted.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        try:
            while not self._closed.is_set():
                self._wanted.wait()
                if self._closed.is_set():
                    break
                self._context.touch()
                self._touched = time.monotonic()
                self._closed.wait(REST_S)
                self._wanted.clear()
        except SecondContextError as e:
            log.get("connector").warning("the second CUDA context is given up, decoding may take 3 %% longer: %s", e)
        try:
            self._context.close()
        except SecondContextError as e:
            log.get("connector").debug("closing the second CUDA context: %s", e)


def on(device: Any, wanted: Any, role: str) -> Quick | None:
    """For a torch device. `wanted`: True or False, None: where it is known to gain. None where there is nothing to gain, or no room."""
    import torch

    check(wanted)
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    index = device.index if device.index is not None else torch.cuda.current_device()
    free, _ = torch.cuda.mem_get_info(index)
    if why := why_not(wanted, role, torch.cuda.get_device_capability(index), free):
        log.get("connector").info("no second CUDA context: %s", why)
        return None
    try:
        context = SecondContext(index)
    except SecondContextError as e:
        log.get("connector").warning("no second CUDA context, decoding may take 3 %% longer: %s", e)
        return None
    used = free - torch.cuda.mem_get_info(index)[0]
    log.get("connector").info("second CUDA context made in %d MiB, so that CUDA graphs replay quicker", used >> 20)
    return Quick(context)


def check(wanted: Any) -> None:
    if wanted is not None and not isinstance(wanted, bool):
        raise ConfigError(_KEY, f"{wanted!r} is neither true nor false", "Leave it out, or say true or false.")


def why_not(wanted: bool | None, role: str, capability: tuple[int, int], free_bytes: int) -> str:
    """Empty when there should be one."""
    if wanted is False:
        return "it is not wanted"
    if role == "kv_producer":
        return "this engine generates no answers"
    if wanted is None and capability != CAPABILITY:
        return "nothing is known of this kind of device"
    if free_bytes < FREE_BYTES:
        return f"only {free_bytes / 2**30:.1f} GiB are free on the device"
    return ""

"""How long the kernel lets others run on before it lets this process: its slice of processor time.

The daemon sleeps most of the time and has little to do when it wakes, while engines compute on every core. Linux (EEVDF,
6.6) lets who runs finish its slice first, 2.8 ms and more, unless the one that wakes asks for a shorter slice (6.12).
A shorter slice is no larger share: whoever has used up what is its own waits like everybody else.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

#: the least that the kernel takes
SHORTEST_S = 0.0001
_CALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}  # sched_setattr, sched_getattr
#: size, policy, flags, nice, priority, runtime, deadline, period, least and most of utilization
_ATTR = struct.Struct("=IIQiIQQQII")


def shorten(seconds: float = SHORTEST_S) -> bool:
    """Of this thread and those that it starts from now on. False where the kernel has no slices that can be asked for."""
    calls = _CALLS.get(platform.machine())
    if calls is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False  # somebody gave this process another policy, and knows why
    wanted = round(seconds * 1e9)
    ask = _ATTR.pack(_ATTR.size, os.SCHED_OTHER, 0, os.getpriority(os.PRIO_PROCESS, 0), 0, wanted, 0, 0, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    got = ctypes.create_string_buffer(_ATTR.size)
    if libc.syscall(calls[0], 0, ask, 0) or libc.syscall(calls[1], 0, got, _ATTR.size, 0):
        return False  # a sandbox may forbid it
    return bool(_ATTR.unpack(got.raw)[5] == wanted)  # older kernels take the call and leave the slice as it is

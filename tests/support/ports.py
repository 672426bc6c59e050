"""Ports that nobody takes between here and whoever is told to listen there: below those that the kernel hands out itself."""

from __future__ import annotations

import contextlib
import os
import socket

#: Linux gives out ports from 32768 on, to whoever dials or asks for "any": those may be gone in the next moment.
_PORTS = range(26000, 32000)
_next = os.getpid() * 97 % len(_PORTS)  # several test runs on one machine begin at different places


def free_port() -> int:
    """Free now, and not given out again by this process for a long while."""
    global _next
    for _ in _PORTS:
        port = _PORTS[_next]
        _next = (_next + 1) % len(_PORTS)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise RuntimeError(f"no free port in {_PORTS}")

"""UCX itself: ucxx or ucp, whichever is installed, as one thing.

UCX has one context for a process, bound to one asyncio loop; ours runs on a thread that lasts as long as the process. Settings
go through the environment before the import. Defaults were measured: with UCX's own rendezvous choice tcp copies twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib
import os
import socket
import struct
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

from pdserve.errors import ConfigError

_SETTINGS = {
    "UCX_RNDV_SCHEME": "put_zcopy",
    "UCX_TCP_CM_REUSEADDR": "y",
    "UCX_KEEPALIVE_INTERVAL": "2s",
    "UCX_TCP_KEEPIDLE": "2s",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}
_SIOCGIFADDR = 0x8915


class Library:
    """ucxx or ucp, whichever is installed, with its differences ironed out, and the loop that it lives on."""

    _lock = threading.Lock()
    _one: Library | None = None

    @classmethod
    def get(cls, tls: str, device: str) -> Library:
        """The process's only one (UCX knows no second); the first caller's settings count. Raises ConfigError."""
        with cls._lock:
            if cls._one is None:
                cls._one = cls(tls, device)
            return cls._one

    def __init__(self, tls: str, device: str) -> None:
        settings = {"UCX_TLS": tls, **_SETTINGS, **({"UCX_NET_DEVICES": device} if device else {})}
        for name, value in settings.items():
            os.environ.setdefault(name, value)  # who sets it himself means it
        self.module, self.name = imported()
        self._tag: Any = int if self.name == "ucp" else self.module._lib.libucxx.UCXXTag
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="ucx-loop", daemon=True)
        self._started: Future[bytes] = Future()
        self.thread.start()
        try:
            self.address = self._started.result(timeout=60)
        except Exception as e:
            raise ConfigError(
                "", f"{self.name} does not start: {e}", "Check UCX_TLS and UCX_NET_DEVICES, or use tcp://."
            ) from e

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            address = self.loop.run_until_complete(self._init())
        except Exception as e:  # noqa: BLE001 - handed to the thread that waits for it
            self._started.set_exception(e)
            return
        self._started.set_result(address)
        self.loop.run_forever()

    async def _init(self) -> bytes:
        if self.name == "ucp":
            self.module.init(blocking_progress_mode=True)
        else:
            self.module.init(progress_mode="blocking")
        return bytes(memoryview(self.module.get_worker_address()))

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """On the library's loop, from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    async def endpoint(self, address: bytes) -> Any:
        theirs = self.module.get_ucx_address_from_buffer(address)
        return await self.module.create_endpoint_from_worker_address(theirs, endpoint_error_handling=True)

    def progress(self) -> None:
        """Lets UCX work once, in the blocking modes; on the library's loop."""
        context = self.module.core._get_ctx()
        context.worker.progress()

    async def send(self, endpoint: Any, data: Any, tag: int) -> None:
        await endpoint.send(data, tag=self._tag(tag), force_tag=True)

    async def receive(self, endpoint: Any, into: Any, tag: int) -> None:
        await endpoint.recv(into, tag=self._tag(tag), force_tag=True)


def imported() -> tuple[Any, str]:
    for name in ("ucxx", "ucp"):
        try:
            return importlib.import_module(name), name
        except ImportError:
            continue
    raise ConfigError(
        "", "ucx:// needs ucxx (or ucx-py), which is not installed", "pip install 'pdserve[ucx]', or use tcp://."
    )


def device_of(address: str) -> str:
    """The network device that has this IPv4 address, for UCX_NET_DEVICES; "" where it cannot be told (then UCX uses all)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return ""


def own_address(peer: str) -> str:
    """The address of ours from which the peer is reached; "" where there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))  # sends nothing
        except OSError:
            return ""
        address: str = probe.getsockname()[0]
        return address

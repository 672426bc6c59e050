"""Who stands at the door: accepts, gives everybody a few seconds to prove the secret, and bounds how many may try at a time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from pdserve import log
from pdserve.errors import ConfigError, ProtocolError, StartError
from pdserve.transfer.transports import door
from pdserve.transfer.transports import handshake as h
from pdserve.transfer.transports.base import TransportError
from pdserve.transfer.transports.security import Security

#: connections that have proved nothing yet: of all, of one address
MAX_PENDING = 64
MAX_PENDING_EACH = 24


class Gate:
    """Who waits to be let in. A newcomer beyond the bounds takes the place of the one who has waited longest: an honest peer
    proves itself within milliseconds, a flood of half-open connections pushes out only itself. Pure."""

    def __init__(self, most: int = MAX_PENDING, most_each: int = MAX_PENDING_EACH) -> None:
        self._most, self._most_each = most, most_each
        self._waiting: OrderedDict[object, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, who: object, address: str) -> object | None:
        """Lets `who` wait; returns whoever has to go for it."""
        neighbours = [other for other, where in self._waiting.items() if where == address]
        gone = None
        if len(neighbours) >= self._most_each:
            gone = neighbours[0]
        elif len(self._waiting) >= self._most:
            gone = next(iter(self._waiting))
        if gone is not None:
            del self._waiting[gone]
        self._waiting[who] = address
        return gone

    def leave(self, who: object) -> None:
        self._waiting.pop(who, None)


class Listener:
    """One listening socket. `admit` gets every connection that has proved the secret, and owns its socket from then on."""

    def __init__(
        self,
        name: str,
        window: int,
        security: Security,
        judge: Callable[[h.Hello], str],
        admit: Callable[[door.Admitted, str], Awaitable[None]],
    ) -> None:
        self._name, self._window, self._security = name, window, security
        self._context: ssl.SSLContext | None = security.context(True) if security.tls else None
        self._judge, self._admit = judge, admit
        self._gate = Gate()
        self._log = log.get("transport")
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._greeting: dict[asyncio.Task[None], socket.socket] = {}
        self.turned_away = 0

    def start(self, host: str, port: int) -> int:
        """Binds and listens; returns the port. Raises StartError."""
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family, backlog=128)
        except (OSError, OverflowError) as e:
            raise StartError(f"cannot listen on {host}:{port}: {e}") from e
        self._socket.setblocking(False)
        self._accepting = asyncio.get_running_loop().create_task(self._accept(self._socket))
        bound: int = self._socket.getsockname()[1]
        return bound

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(listening)
            except OSError as e:
                self._log.warning("cannot accept connections: %s", e)  # out of descriptors: it passes
                await asyncio.sleep(0.2)
                continue
            sock.setblocking(False)
            task = loop.create_task(self._greet(sock, f"{address[0]}:{address[1]}"))
            self._greeting[task] = sock
            task.add_done_callback(self._greeted)
            pushed_out = self._gate.enter(task, str(address[0]))
            if isinstance(pushed_out, asyncio.Task):
                pushed_out.cancel()

    async def _greet(self, sock: socket.socket, address: str) -> None:
        me = asyncio.current_task()
        assert me is not None
        admitted: door.Admitted | None = None
        try:
            async with asyncio.timeout(door.GREET_S):
                admitted = await door.answer(sock, self._name, self._window, self._security, self._context, self._judge)
                if admitted is None:
                    await _show_out(sock)
        except (TransportError, ProtocolError, TimeoutError, OSError) as e:
            self._log.debug("%s was turned away: %s", address, e or "too slow")
        if admitted is not None:
            del self._greeting[me]  # the socket is not ours any more
            self._gate.leave(me)
            await self._hand_over(admitted, sock, address)
        else:
            self.turned_away += 1

    def _greeted(self, task: asyncio.Task[None]) -> None:
        """The task is over; it may have been cancelled before its first step, so it is here that the socket is closed."""
        self._gate.leave(task)
        sock = self._greeting.pop(task, None)
        if sock is not None:
            sock.close()

    async def _hand_over(self, admitted: door.Admitted, sock: socket.socket, address: str) -> None:
        try:
            await self._admit(admitted, address)
        except (TransportError, ProtocolError, ConfigError, OSError) as e:
            self._log.warning("%s (%s) was let in, but then: %s", admitted.peer, address, e)
            sock.close()

    async def close(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
        for task in list(self._greeting):
            task.cancel()
        waiting = [t for t in (self._accepting, *self._greeting) if t is not None]
        if waiting:
            await asyncio.wait(waiting, timeout=5)
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()


async def _show_out(sock: socket.socket) -> None:
    """Closes so that the peer can still read what it was told: a socket closed over unread bytes takes that away from it."""
    sock.shutdown(socket.SHUT_WR)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.5):
            for _ in range(16):
                if not await asyncio.get_running_loop().sock_recv(sock, 4096):
                    return

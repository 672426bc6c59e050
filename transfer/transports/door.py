"""Carrying the handshake out: on the loop, with a deadline, few bytes and little memory for whoever has proved nothing yet."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pdserve.errors import ProtocolError
from pdserve.transfer.transports import handshake as h
from pdserve.transfer.transports.base import DeadlinePassed, PeerLost, PeerRefused, PeerUnreachable
from pdserve.transfer.transports.security import Security
from pdserve.transfer.transports.tls import TlsPipe

#: from the first byte to the proof
GREET_S = 5.0
_TLS_READ = 16384
#: TLS handshakes with long certificate chains fit into this
_MAX_TLS = 256 << 10


class Wire:
    """A socket during the handshake. Reads exactly what is asked for, so nothing of what follows is swallowed (with TLS, what was
    read too far stays in the pipe)."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.pipe: TlsPipe | None = None
        self._loop = asyncio.get_running_loop()

    async def read(self, size: int) -> bytes:
        """Raises PeerLost."""
        data = bytearray(size)
        view = memoryview(data)
        filled = 0
        while filled < size:
            if self.pipe is not None:
                got = self.pipe.read_into(view[filled:])
                if not got:
                    self.pipe.feed(await self._some(_TLS_READ))
                filled += got
            else:
                part = await self._some(size - filled)
                view[filled : filled + len(part)] = part
                filled += len(part)
        return bytes(data)

    async def _some(self, size: int) -> bytes:
        try:
            data = await self._loop.sock_recv(self.sock, size)
        except OSError as e:
            raise PeerLost(f"the peer hung up: {e}") from e
        if not data:
            raise PeerLost("the peer hung up")
        return data

    async def write(self, data: bytes) -> None:
        await self._raw(data if self.pipe is None else self.pipe.encrypt(data))

    async def _raw(self, data: bytes) -> None:
        try:
            await self._loop.sock_sendall(self.sock, data)
        except OSError as e:
            raise PeerLost(f"the peer hung up: {e}") from e

    async def read_frame(self) -> bytes:
        return await self.read(h.frame_length(await self.read(2)))

    async def secure(self, context: ssl.SSLContext, server_side: bool) -> None:
        """TLS from here on."""
        pipe = TlsPipe(context, server_side)
        came = 0
        try:
            while not pipe.handshake():
                if out := pipe.outgoing():
                    await self._raw(out)
                data = await self._some(_TLS_READ)
                came += len(data)
                if came > _MAX_TLS:
                    raise PeerRefused(f"a TLS handshake of more than {_MAX_TLS} bytes")
                pipe.feed(data)
        finally:
            if out := pipe.outgoing():  # also the alert that says what was wrong
                with contextlib.suppress(PeerLost):
                    await self._raw(out)
        self.pipe = pipe


@dataclass(frozen=True)
class Admitted:
    """A connection whose peer has proved that it knows the secret."""

    wire: Wire
    peer: str
    session: bytes
    what: str
    #: bytes that the peer takes at a time
    window: int


# ---- dialling ----


async def dial(
    host: str, port: int, security: Security, context: ssl.SSLContext | None, hello: h.Hello, deadline: float
) -> Admitted:
    """Connects and proves. Raises PeerUnreachable, PeerRefused, DeadlinePassed."""
    where = f"{host}:{port}"
    left = deadline - time.monotonic()
    wire: Wire | None = None
    try:
        async with asyncio.timeout(max(0.0, left)):
            wire = Wire(await _connected(host, port))
            admitted = await _prove(wire, where, security, context, hello)
    except TimeoutError as e:
        _shut(wire)
        what = "did not answer" if wire is None else "took the connection, but did not answer"
        raise DeadlinePassed(f"{where} {what} within {max(0.0, left):.1f} s") from e
    except ProtocolError as e:
        _shut(wire)
        raise PeerRefused(f"{where} answers, but not as a pdserve daemon's transport: {e}") from e
    except PeerLost as e:
        _shut(wire)
        raise PeerRefused(
            f"{where} took the connection and hung up before it was greeted ({e}); is it overloaded?"
        ) from e
    except BaseException:
        _shut(wire)
        raise
    return admitted


async def _connected(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    found = await _resolved(host, port)
    problem: OSError | None = None
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
        except OSError as e:
            sock.close()
            problem = e
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise PeerUnreachable(f"{host}:{port}: {problem}") from problem


async def _resolved(host: str, port: int) -> list[Any]:
    try:  # an address needs no resolver, and no thread for it
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass
    try:
        return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as e:
        raise PeerUnreachable(f"{host}:{port}: {e}") from e


async def _prove(
    wire: Wire, where: str, security: Security, context: ssl.SSLContext | None, hello: h.Hello
) -> Admitted:
    await wire.write(h.greeting(context is not None))
    h.check_greeting(await wire.read(h.GREETING_BYTES), context is not None, where)
    channel = b""
    if context is not None:
        await wire.secure(context, server_side=False)
        assert wire.pipe is not None
        channel = wire.pipe.peer_fingerprint()
    await wire.write(h.encode(hello))
    challenge = h.decode(await wire.read_frame(), h.Challenge)
    await wire.write(h.encode(h.Proof(h.mac(security.secret, "dialler", hello, challenge, channel))))
    answer = h.decode_answer(await wire.read_frame())
    if isinstance(answer, h.Refusal):
        raise PeerRefused(f"{where}: {answer.reason}")
    if not h.proves(answer.mac, h.mac(security.secret, "listener", hello, challenge, channel)):
        raise PeerRefused(f"{where} let us in, but does not know the shared secret itself")
    return Admitted(wire, challenge.name, answer.session, hello.what, challenge.window)


# ---- answering ----


async def answer(
    sock: socket.socket,
    name: str,
    window: int,
    security: Security,
    context: ssl.SSLContext | None,
    judge: Callable[[h.Hello], str],
) -> Admitted | None:
    """The listener's side; None when the peer was shown out. `judge` says why a Hello is not acceptable, or "".

    The caller bounds the time and owns the socket.
    """
    wire = Wire(sock)
    tls = context is not None
    start = await wire.read(h.PREFIX_BYTES)
    if not h.looks_like_greeting(start):
        await wire.write(h.greeting(tls))  # whoever reads it knows what this port is
        return None
    version, their_tls = h.read_greeting(start + await wire.read(h.GREETING_BYTES - len(start)))
    await wire.write(h.greeting(tls))
    if version != h.VERSION or their_tls != tls:
        return None  # the greeting has said why
    channel = b""
    if context is not None:
        await wire.secure(context, server_side=True)
        channel = security.own_fingerprint()
    hello = h.decode(await wire.read_frame(), h.Hello)
    challenge = h.Challenge(name, h.nonce(), window)
    await wire.write(h.encode(challenge))
    proof = h.decode_proof(await wire.read_frame())
    if not h.proves(proof.mac, h.mac(security.secret, "dialler", hello, challenge, channel)):
        await wire.write(
            h.encode(h.Refusal("the shared secret is another one there; give all daemons the same peers.secret"))
        )
        return None
    if problem := judge(hello):
        await wire.write(h.encode(h.Refusal(problem)))
        return None
    session = hello.session or secrets.token_bytes(16)
    mac = h.mac(security.secret, "listener", hello, challenge, channel)
    await wire.write(h.encode(h.Welcome(mac, session)))
    return Admitted(wire, hello.name, session, hello.what, hello.window)


def _shut(wire: Wire | None) -> None:
    if wire is not None:
        wire.sock.close()

"""What tcp, ucx and nixl have in common: one address, the door, and a control way of TCP for each peer. They differ in the
plane that moves the bytes, which a subclass makes."""

from __future__ import annotations

import asyncio
import ssl
import time
from urllib.parse import urlsplit

from pdserve import log
from pdserve.errors import ConfigError
from pdserve.transfer.transports import door
from pdserve.transfer.transports import handshake as h
from pdserve.transfer.transports.base import Connection, DeadlinePassed, Local, PeerLost, PeerRefused, Service
from pdserve.transfer.transports.control import Control
from pdserve.transfer.transports.listener import Listener
from pdserve.transfer.transports.plane import Limits, Plane
from pdserve.transfer.transports.security import Security
from pdserve.transfer.transports.session import Session

MAX_SESSIONS = 256


class NetTransport:
    """Implements base.Transport; abstract in the plane."""

    scheme = ""
    #: whether its bytes can go through TLS as well; where they cannot, TLS is refused, never left out
    encrypts = False

    def __init__(self, local: Local, security: Security, limits: Limits) -> None:
        if security.tls and not self.encrypts:
            raise ConfigError(
                "",
                f"{self.scheme}:// cannot encrypt its bytes, and TLS was asked for",
                "Use tcp://, or leave TLS out and let WireGuard or a private network guard the bytes.",
            )
        self.local, self.security, self.limits = local, security, limits
        self.sessions: dict[bytes, Session] = {}
        self._context: ssl.SSLContext | None = security.context(False) if security.tls else None
        self._listener: Listener | None = None
        self._service: Service | None = None
        self._log = log.get("transport")

    # ---- what a subclass says ----

    def make_plane(self, dialled: bool) -> Plane:
        """A plane for a new session. Raises TransportError."""
        raise NotImplementedError

    async def make_ready(self, session: Session, host: str, port: int, deadline: float) -> None:
        """The dialler's: whatever must be there before connect() returns. Raises TransportError."""

    async def add_stream(self, session: Session, wire: door.Wire) -> None:
        """The listener's: another connection of the same session. Raises TransportError."""
        raise PeerRefused(f"{self.scheme} has no streams")

    # ---- base.Transport ----

    async def listen(self, url: str, service: Service) -> str:
        host, port = address_of(url, self.scheme)
        self._service = service
        self._listener = Listener(self.local.name, self.limits.window_bytes, self.security, self._judge, self._admit)
        bound = self._listener.start(host, port)
        self._log.info("%s: listening on %s:%d%s", self.scheme, host, bound, " (TLS)" if self.security.tls else "")
        return f"{self.scheme}://{f'[{host}]' if ':' in host else host}:{bound}"

    async def connect(self, url: str, service: Service, deadline: float) -> Connection:
        host, port = address_of(url, self.scheme)
        admitted = await self.dial(host, port, "control", b"", deadline)
        session = await self._open(admitted, service, f"{host}:{port}", dialled=True)
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self.make_ready(session, host, port, deadline)
        except TimeoutError as e:
            await session.close("not ready in time")
            raise DeadlinePassed(f"{url}: not all of the connection was there in time") from e
        except BaseException as e:
            await session.close(f"could not be made ready: {e}")
            raise
        if session.closed:
            raise PeerLost(f"{url}: ended while it was made")
        return session

    async def close(self) -> None:
        if self._listener is not None:
            await self._listener.close()
        await asyncio.gather(*(session.close("the daemon stops") for session in list(self.sessions.values())))

    # ---- parts ----

    async def dial(self, host: str, port: int, what: str, session: bytes, deadline: float) -> door.Admitted:
        assert what in ("control", "stream")
        kind = "control" if what == "control" else "stream"
        hello = h.Hello(self.local.name, h.nonce(), self.scheme, kind, session, self.limits.window_bytes)  # type: ignore[arg-type]
        return await door.dial(host, port, self.security, self._context, hello, deadline)

    def _judge(self, hello: h.Hello) -> str:
        if hello.scheme != self.scheme:
            return f"this address is for {self.scheme}://, you dialled it as {hello.scheme}://"
        if hello.name == self.local.name:
            return f"{hello.name!r} is this daemon's own name; every host needs another"
        if hello.what == "stream":
            return "" if hello.session in self.sessions else "there is no such session (any more)"
        if len(self.sessions) >= MAX_SESSIONS:
            return f"{MAX_SESSIONS} connections are open already"
        return ""

    async def _admit(self, admitted: door.Admitted, address: str) -> None:
        if admitted.what == "stream":
            session = self.sessions.get(admitted.session)
            if session is None or session.peer != admitted.peer:
                raise PeerRefused("a stream for a session that is gone, or another's")
            await self.add_stream(session, admitted.wire)
            return
        assert self._service is not None
        await self._open(admitted, self._service, address, dialled=False)

    def _forget(self, session: Session) -> None:
        self.sessions.pop(session.token, None)

    async def _open(self, admitted: door.Admitted, service: Service, address: str, *, dialled: bool) -> Session:
        control = Control(admitted.wire.pipe)
        plane = self.make_plane(dialled)
        session = Session(
            control, plane, service, self.local, self.limits, admitted.peer, address, credit=admitted.window
        )
        control.session = session
        self.sessions[admitted.session] = session
        session.on_closed = self._forget
        session.token = admitted.session
        session.start()
        if not dialled:
            service.connected(session)  # before anything can come from it
        await control.open(admitted.wire.sock)
        return session


async def plane_ready(session: Session, ready: asyncio.Event, where: str) -> None:
    """Waits until the planes at both ends have found each other. Raises PeerRefused when the connection ends first."""
    waiting = asyncio.ensure_future(ready.wait())
    try:
        while not waiting.done() and not session.closed:
            await asyncio.wait([waiting], timeout=0.1)
    finally:
        waiting.cancel()
    if session.closed:
        raise PeerRefused(f"{where}: {session!r}")


def address_of(url: str, scheme: str) -> tuple[str, int]:
    """Host and port of `scheme://host:port`. Raises ConfigError."""
    fix = f"Write it like {scheme}://10.0.0.5:7400."
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as e:
        raise ConfigError("peers.url", f"{url!r} is not a URL ({e})", fix) from e
    if parts.scheme != scheme:
        raise ConfigError("peers.url", f"{url!r} does not begin with {scheme}://", fix)
    if not parts.hostname or port is None:
        raise ConfigError("peers.url", f"{url!r} lacks {'a port' if parts.hostname else 'an address'}", fix)
    return parts.hostname, port

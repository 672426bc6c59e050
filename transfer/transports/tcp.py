"""tcp://host:port: control on one socket, bytes on up to `streams` others, of which as many are used as pay off (tuner.py)."""

from __future__ import annotations

import asyncio

from pdserve.transfer.transports import door
from pdserve.transfer.transports.base import Local
from pdserve.transfer.transports.net import NetTransport
from pdserve.transfer.transports.plane import Limits, Plane
from pdserve.transfer.transports.security import Security
from pdserve.transfer.transports.session import Session
from pdserve.transfer.transports.streams import Streams

DEFAULT_STREAMS = 4
MAX_STREAMS = 16


class TcpTransport(NetTransport):
    """Implements base.Transport."""

    scheme = "tcp"
    encrypts = True

    def __init__(
        self, local: Local, security: Security, limits: Limits, streams: int = DEFAULT_STREAMS, adapt: bool = True
    ) -> None:
        super().__init__(local, security, limits)
        self._streams, self._adapt = streams, adapt

    def make_plane(self, dialled: bool) -> Plane:
        # Who dials decides how many there are; who listens takes what comes, within reason.
        return Streams(self._streams if dialled else MAX_STREAMS, self._adapt)

    async def make_ready(self, session: Session, host: str, port: int, deadline: float) -> None:
        plane = session.plane
        assert isinstance(plane, Streams)
        dials = [
            asyncio.create_task(self.dial(host, port, "stream", session.token, deadline)) for _ in range(self._streams)
        ]
        try:
            for dial in dials:
                await dial
        except BaseException:
            for dial in dials:
                dial.cancel()
            for admitted in await asyncio.gather(*dials, return_exceptions=True):
                if isinstance(admitted, door.Admitted):
                    admitted.wire.sock.close()
            raise
        for dial in dials:
            plane.add(dial.result().wire.sock, dial.result().wire.pipe)

    async def add_stream(self, session: Session, wire: door.Wire) -> None:
        assert isinstance(session.plane, Streams)
        session.plane.add(wire.sock, wire.pipe)

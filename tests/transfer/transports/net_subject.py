"""A transport over real sockets as the conformance rules want it. Its name is its own: `conftest` may be any folder's."""

import socket
from urllib.parse import urlsplit

from relay import Relay

from pdserve.transfer.transports.conformance.subject import Subject
from pdserve.transfer.transports.plane import Limits
from pdserve.transfer.transports.security import Security

SECRET = b"a secret of the tests' own"


class NetSubject(Subject):
    """A transport over real sockets on loopback. Faults hold up, or cut, what goes through a relay."""

    scheme = "tcp"
    #: connections that carry small messages, which a stall leaves alone
    control_connections = 1
    lasting_threads = ("relay",)

    def __init__(self, make):
        self._make = make
        self.relays = []
        self.sockets = []

    def make(self, local):
        return self._make(local)

    def url(self, name):
        return f"{self.scheme}://127.0.0.1:0"

    def way(self, bound):
        self.relays.append(Relay(urlsplit(bound).port))
        return f"{self.scheme}://127.0.0.1:{self.relays[-1].port}"

    def nobody(self):
        s = socket.socket()  # bound, so that nobody else is given the port, but deaf
        s.bind(("127.0.0.1", 0))
        self.sockets.append(s)
        return f"{self.scheme}://127.0.0.1:{s.getsockname()[1]}"

    def wedged(self):
        s = socket.create_server(("127.0.0.1", 0))
        self.sockets.append(s)
        return f"{self.scheme}://127.0.0.1:{s.getsockname()[1]}"

    def stall(self, sender, receiver):
        self.relays[-1].held = lambda number: number >= self.control_connections
        return True

    def resume(self, sender, receiver):
        self.relays[-1].held = lambda number: False

    def cut(self, one, other):
        self.relays[-1].cut()
        return True

    def close(self):
        for thing in (*self.relays, *self.sockets):
            thing.close()


class PlaneSubject(NetSubject):
    """A transport whose bytes do not go through the relay: they are held back where they are sent."""

    def __init__(self, kind):
        super().__init__(self._transport)
        self.scheme, self._kind = kind.scheme, kind
        self.made = {}

    def _transport(self, local):
        self.made[local.name] = self._kind(local, Security(SECRET), Limits(segment_bytes=4 << 20), "tcp")
        return self.made[local.name]

    def _planes(self, name):
        return [session.plane for session in self.made[name].sessions.values()]

    def stall(self, sender, receiver):
        for plane in self._planes(sender):
            plane.held.set()
        return True

    def resume(self, sender, receiver):
        for plane in self._planes(sender):
            plane.held.clear()

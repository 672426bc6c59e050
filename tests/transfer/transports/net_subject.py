"""A transport over real sockets as the conformance rules want it. Its name is its own: `conftest` may be any folder's."""

import socket
from urllib.parse import urlsplit

from relay import Relay

from pdserve.transfer.transports import conformance

SECRET = b"a secret of the tests' own"


class NetSubject(conformance.Subject):
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
        with socket.create_server(("127.0.0.1", 0)) as s:
            port = s.getsockname()[1]
        return f"{self.scheme}://127.0.0.1:{port}"

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

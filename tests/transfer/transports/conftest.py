"""What the tests here share; a missing library or program skips with its reason."""

import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from relay import Relay

from pdserve.transfer.transports import conformance
from pdserve.transfer.transports.security import Security

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


@pytest.fixture
def security():
    return Security(SECRET)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A CA, certificates of two hosts signed by it, and one signed by nobody: name -> (cert, key)."""
    folder = tmp_path_factory.mktemp("tls")
    made = {}
    for name in ("ca", "a", "b", "stranger"):
        cert, key = folder / f"{name}.pem", folder / f"{name}.key"
        argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        argv += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", f"/CN={name}"]
        if name in ("a", "b"):
            argv += ["-CA", str(made["ca"][0]), "-CAkey", str(made["ca"][1])]
        try:
            subprocess.run(argv, check=True, capture_output=True, timeout=60)
        except FileNotFoundError:
            pytest.skip("openssl is not installed")
        made[name] = cert, key
    return {name: (str(cert), str(key)) for name, (cert, key) in made.items()}

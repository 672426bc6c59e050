"""nixl:// keeps the rules of all transports, with the real library over whatever it finds here."""

import importlib.util
import sys

import numpy as np
import pytest
from net_subject import SECRET, NetSubject

from pdserve.errors import ConfigError
from pdserve.transfer.transports import conformance, nixl
from pdserve.transfer.transports.base import Local
from pdserve.transfer.transports.security import Security
from pdserve.transfer.transports.session import Limits

HAVE = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13"))
needs_nixl = pytest.mark.skipif(not HAVE, reason="neither nixl-cu12 nor nixl-cu13 is installed")


class NixlSubject(NetSubject):
    scheme = "nixl"

    def __init__(self):
        super().__init__(self._transport)
        self.made = {}

    def _transport(self, local):
        self.made[local.name] = nixl.NixlTransport(local, Security(SECRET), Limits(segment_bytes=4 << 20), "tcp")
        return self.made[local.name]

    def planes(self, name):
        return [session.plane for session in self.made[name].sessions.values()]

    def stall(self, sender, receiver):
        """The bytes go another way than the relay's: they are held back where they are sent."""
        for plane in self.planes(sender):
            plane.held.set()
        return True

    def resume(self, sender, receiver):
        for plane in self.planes(sender):
            plane.held.clear()


@needs_nixl
@pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
def test_rule(rule):
    conformance.run(rule, NixlSubject())


def test_a_missing_library_is_one_sentence(monkeypatch):
    for name in ("nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"{name}._api", None)
    with pytest.raises(ConfigError, match="nixl-cu12"):
        nixl.NixlTransport(Local("a", np.zeros(1, "u1")), Security(SECRET), Limits())


def test_tls_is_refused_and_not_ignored(certificates):
    with pytest.raises(ConfigError, match="cannot encrypt"):
        nixl.NixlTransport(Local("a", np.zeros(1, "u1")), Security(SECRET, *certificates["a"]), Limits())

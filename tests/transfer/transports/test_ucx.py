"""ucx:// keeps the rules of all transports, with the real library over tcp. Without it there is one clear sentence."""

import importlib.util
import sys

import pytest
from net_subject import SECRET, NetSubject

from pdserve.errors import ConfigError
from pdserve.transfer.transports import conformance, ucx
from pdserve.transfer.transports.base import Local
from pdserve.transfer.transports.security import Security
from pdserve.transfer.transports.session import Limits

HAVE = any(importlib.util.find_spec(name) for name in ("ucxx", "ucp"))
needs_ucx = pytest.mark.skipif(not HAVE, reason="neither ucxx nor ucx-py is installed (extra: ucx)")


class UcxSubject(NetSubject):
    scheme = "ucx"
    lasting_threads = ("relay", "ucx-loop", "asyncio_")

    def __init__(self):
        super().__init__(self._transport)
        self.made = {}

    def _transport(self, local):
        self.made[local.name] = ucx.UcxTransport(local, Security(SECRET), Limits(segment_bytes=4 << 20))
        return self.made[local.name]

    def planes(self, name):
        return [session.plane for session in self.made[name].sessions.values()]

    def stall(self, sender, receiver):
        """The bytes go another way than the relay's: they are held back where they are sent, after their header."""
        for plane in self.planes(sender):
            plane.held.set()
        return True

    def resume(self, sender, receiver):
        for plane in self.planes(sender):
            plane.held.clear()


@needs_ucx
@pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
def test_rule(rule):
    conformance.run(rule, UcxSubject())


def test_a_missing_library_is_one_sentence(monkeypatch):
    for name in ("ucxx", "ucp"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pdserve\[ucx\]"):
        ucx.UcxTransport(Local("a", conformance.np.zeros(1, "u1")), Security(SECRET), Limits())


def test_tls_is_refused_and_not_ignored(certificates):
    with pytest.raises(ConfigError, match="cannot encrypt"):
        ucx.UcxTransport(Local("a", conformance.np.zeros(1, "u1")), Security(SECRET, *certificates["a"]), Limits())


def test_the_device_of_an_address():
    assert ucx.device_of("127.0.0.1") == "lo"
    assert ucx.device_of("192.0.2.1") == ""

"""nixl:// keeps the rules of all transports, with the real library over whatever it finds here."""

import importlib.util
import sys

import numpy as np
import pytest
from net_subject import SECRET, PlaneSubject

from pdserve.errors import ConfigError
from pdserve.transfer.transports import conformance, nixl
from pdserve.transfer.transports.base import Local
from pdserve.transfer.transports.plane import Limits
from pdserve.transfer.transports.security import Security

HAVE = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13"))
needs_nixl = pytest.mark.skipif(not HAVE, reason="neither nixl-cu12 nor nixl-cu13 is installed")


@needs_nixl
@pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
def test_rule(rule):
    conformance.run(rule, PlaneSubject(nixl.NixlTransport))


def test_a_missing_library_is_one_sentence(monkeypatch):
    for name in ("nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"{name}._api", None)
    with pytest.raises(ConfigError, match="nixl-cu12"):
        nixl.NixlTransport(Local("a", np.zeros(1, "u1")), Security(SECRET), Limits())

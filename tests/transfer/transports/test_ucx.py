"""ucx:// keeps the rules of all transports, with the real library over tcp. Without it there is one clear sentence."""

import importlib.util
import sys

import numpy as np
import pytest
from net_subject import SECRET, PlaneSubject

from pdserve.errors import ConfigError
from pdserve.transfer.transports import conformance, ucx, ucx_library
from pdserve.transfer.transports.base import Local
from pdserve.transfer.transports.plane import Limits
from pdserve.transfer.transports.security import Security

HAVE = any(importlib.util.find_spec(name) for name in ("ucxx", "ucp"))
needs_ucx = pytest.mark.skipif(not HAVE, reason="neither ucxx nor ucx-py is installed (extra: ucx)")


class UcxSubject(PlaneSubject):
    lasting_threads = ("relay", "ucx-loop", "asyncio_")


@needs_ucx
@pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
def test_rule(rule):
    conformance.run(rule, UcxSubject(ucx.UcxTransport))


def test_a_missing_library_is_one_sentence(monkeypatch):
    for name in ("ucxx", "ucp"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pdserve\[ucx\]"):
        ucx.UcxTransport(Local("a", np.zeros(1, "u1")), Security(SECRET), Limits())


def test_the_device_of_an_address():
    assert ucx_library.device_of("127.0.0.1") == "lo"
    assert ucx_library.device_of("192.0.2.1") == ""

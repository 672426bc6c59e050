"""Transports by URL: what is wrong is named, with what would be right."""

import numpy as np
import pytest
from net_subject import SECRET

from pdserve.errors import ConfigError
from pdserve.transfer.transports import registry
from pdserve.transfer.transports.base import Local
from pdserve.transfer.transports.security import Security


def build(url, security=None):
    return registry.build(url, Local("a", np.zeros(1 << 20, np.uint8)), security or Security(SECRET), "peers.listen")


def test_options_reach_the_transport():
    made = build("tcp://10.0.0.5:7400?streams=2&window=8MiB&segment=1MiB&verify=0&silence=5")
    assert made.scheme == "tcp"
    assert made.make_plane(True)._most == 2
    limits = made.limits
    assert (limits.window_bytes, limits.segment_bytes, limits.verify, limits.silence_s) == (
        8 << 20,
        1 << 20,
        False,
        5.0,
    )


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("tpc://h:1", "Did you mean tcp://"),
        ("h:1", "is not a transport"),
        ("", "is not a transport"),
        ("tcp://h:1?stream=2", "Did you mean streams"),
        ("tcp://h:1?verify=maybe", "Give 0 or 1"),
        ("tcp://h:1?window=many", "64MiB"),
        ("tcp://h:1?streams=99", "streams"),
        ("tcp://h:1?silence=soon", "Give a number"),
        ("tcp://h:1?segment=32MiB", "Enlarge window"),
        ("tcp://[h", "is not a URL"),
    ],
)
def test_what_is_wrong_is_named(url, words):
    with pytest.raises(ConfigError) as caught:
        build(url)
    assert caught.value.key == "peers.listen"
    assert words in str(caught.value)


@pytest.mark.parametrize(("scheme", "words"), [("ucx", "pdserve[ucx]"), ("nixl", "nixl-cu12")])
def test_a_missing_library_is_said_where_it_was_asked_for(scheme, words, monkeypatch):
    import sys

    for name in ("ucxx", "ucp", "nixl_cu12", "nixl_cu13", "nixl_cu12._api", "nixl_cu13._api"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as caught:
        build(f"{scheme}://127.0.0.1:1")
    assert caught.value.key == "peers.listen"
    assert words in str(caught.value)
    assert "tcp://" in str(caught.value)


def test_the_fallback_needs_nothing():
    assert build(f"{registry.FALLBACK}://h:1").scheme == "tcp"


@pytest.mark.parametrize("scheme", ["ucx", "nixl"])
def test_tls_is_refused_where_nothing_encrypts(scheme, certificates):
    with pytest.raises(ConfigError, match="cannot encrypt") as caught:
        build(f"{scheme}://127.0.0.1:1", Security(SECRET, *certificates["a"]))
    assert caught.value.key == "peers.listen"
    assert "WireGuard" in str(caught.value)


def test_a_small_window_makes_small_segments():
    """Only a segment that somebody asked for can be too large for the window."""
    assert build("tcp://10.0.0.5:7400?window=2MiB").limits.window_bytes == 2 << 20

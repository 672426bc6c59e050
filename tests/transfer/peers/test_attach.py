"""How a daemon becomes one of several: its options, and what is refused before anything listens."""

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from pdserve import log
from pdserve.errors import ConfigError
from pdserve.metrics.cache import CACHE
from pdserve.metrics.metric import build
from pdserve.transfer.eviction import LeafFirstLru
from pdserve.transfer.peers.attach import attach
from pdserve.transfer.store import Store

OPTIONS = {
    "peer_listen": "tcp://127.0.0.1:0", "host_name": "a", "peer": [], "peers_from": None, "peer_secret_file": None,
    "peer_cert": None, "peer_key": None, "peer_ca": None, "state": None,
}  # fmt: skip


@pytest.fixture
def daemon():
    """What attach() uses of a daemon."""
    registry = CollectorRegistry()
    made = build(CACHE, registry)
    tiering = SimpleNamespace(beyond=None)
    return SimpleNamespace(
        registry=registry, metrics=made, daemon_id="e", chunk_tokens=256, store=Store(1 << 20, LeafFirstLru(), made),
        arena=SimpleNamespace(bytes=np.zeros(1 << 20, np.uint8)), tiering=tiering, node=None, log=log.get("test"),
        journal=SimpleNamespace(flush=lambda: None),
    )  # fmt: skip


def options(**given):
    return argparse.Namespace(**(OPTIONS | given))


def test_without_an_address_it_stays_alone(daemon):
    attach(daemon, options(peer_listen=None))
    assert daemon.node is None
    with pytest.raises(ConfigError, match="--peer-listen: missing"):
        attach(daemon, options(peer_listen=None, peer=["b=tcp://10.0.0.2:7900"]))


def test_the_secret_comes_from_a_file_or_the_environment(daemon, tmp_path, monkeypatch):
    monkeypatch.delenv("PDSERVE_PEER_SECRET", raising=False)
    with pytest.raises(ConfigError, match=r"peers\.secret: missing.*PDSERVE_PEER_SECRET"):
        attach(daemon, options())
    with pytest.raises(ConfigError, match=r"peers\.secret: .*nowhere cannot be read"):
        attach(daemon, options(peer_secret_file=str(tmp_path / "nowhere")))
    (tmp_path / "short").write_text("abc\n")
    with pytest.raises(ConfigError, match="at least 16"):
        attach(daemon, options(peer_secret_file=str(tmp_path / "short")))
    monkeypatch.setenv("PDSERVE_PEER_SECRET", "x" * 32)
    attach(daemon, options())
    assert daemon.node.name == "a"
    assert daemon.tiering.beyond is daemon.node.fetching


def test_a_scheme_that_is_none_is_said_so(daemon, monkeypatch):
    monkeypatch.setenv("PDSERVE_PEER_SECRET", "x" * 32)
    with pytest.raises(ConfigError, match="udp"):
        attach(daemon, options(peer_listen="udp://127.0.0.1:1"))

"""Servers for the tests here: started once, on free ports, killed at the end. A missing program skips with its reason."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # benchmarks use the same helpers

import tier_servers
from tier_servers import Missing, Relay


def serve(kind, *args):
    try:
        server = kind(*args)
    except Missing as e:
        pytest.skip(str(e))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def redis_server():
    yield from serve(tier_servers.Redis)


@pytest.fixture(scope="session")
def tls_files(tmp_path_factory):
    try:
        return tier_servers.make_certificates(tmp_path_factory.mktemp("tls"))
    except Missing as e:
        pytest.skip(str(e))


@pytest.fixture(scope="session")
def tls_redis_server(tls_files):
    yield from serve(tier_servers.Redis, tls_files)


@pytest.fixture(scope="session")
def s3_server():
    yield from serve(tier_servers.LocalBucket)


@pytest.fixture(scope="session")
def moto_server():
    yield from serve(tier_servers.Moto)


@pytest.fixture(scope="session")
def mooncake_server():
    yield from serve(tier_servers.Mooncake)


@pytest.fixture
def relay():
    """relay(port) -> Relay"""
    made = []

    def make(port):
        made.append(Relay(port))
        return made[-1]

    yield make
    for r in made:
        r.close()


@pytest.fixture
def tier(subject):
    """The conformance suite's subject of the file, opened."""
    made = subject.open()
    yield made
    made.close()

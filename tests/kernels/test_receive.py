"""Receiving and digesting in one pass: the same bytes and the same digest as when they are read afterwards."""

import itertools
import random
import select
import socket
import threading

import numpy as np
import pytest

from pdserve import kernels
from pdserve.kernels import receive

pytestmark = pytest.mark.skipif(not receive.available(), reason="no C++ compiler is installed")


@pytest.fixture
def ends():
    """Two connected sockets, over TCP: only there the kernel waits for many bytes at a time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        two, _ = server.accept()
    yield one, two
    one.close()
    two.close()


def random_bytes(size):
    return np.random.default_rng(size).integers(0, 256, size, np.uint8)


def received(sock, to, following=None, word=0, arrival=None, **fields):
    """Receives until all is there, however often the time is over."""
    following = np.zeros(8, np.uint8) if following is None else following
    arrival = arrival or receive.Arrival(**fields)
    for _ in range(1000):
        if receive.receive(sock.fileno(), to, following, word, 0.1, arrival):
            return arrival
    raise AssertionError("the bytes never came")


@pytest.mark.parametrize("size", [1, 7, 8, 9, 4096, 262_143, 262_144, 262_145, 1_000_003, 5_000_003])
def test_bytes_and_digest_in_one_pass(ends, size):
    data, to = random_bytes(size), np.zeros(size, np.uint8)
    sender = threading.Thread(target=ends[0].sendall, args=(data.tobytes(),))
    sender.start()
    arrival = received(ends[1], to)
    sender.join(30)
    assert not sender.is_alive()
    assert (to == data).all()
    assert (arrival.done, arrival.digested, arrival.beyond) == (size, size, 0)
    assert receive.finish(arrival.sum, size) == kernels.digest(data)


def test_bytes_that_come_in_drops(ends):
    """In parts that end anywhere, with pauses longer than our patience: the digest does not depend on it."""
    data, to = random_bytes(5003), np.zeros(5003, np.uint8)
    rng, at = random.Random(2), 0
    arrival, following = receive.Arrival(), np.zeros(8, np.uint8)
    while at < data.size:
        size = rng.choice([1, 3, 8, 500, 1999])
        ends[0].sendall(data[at : at + size].tobytes())
        at += size
        if at < data.size and rng.random() < 0.5:
            assert not receive.receive(ends[1].fileno(), to, following, 0, 0.01, arrival)
    received(ends[1], to, following, arrival=arrival)
    assert (to == data).all()
    assert receive.finish(arrival.sum, data.size) == kernels.digest(data)


def test_segments_in_any_order_add_up():
    data = random_bytes(100_005)
    cuts = [0, 8, 4096, 65_536, 99_992, data.size]
    parts = [receive.part(data[a:b], a // 8) for a, b in itertools.pairwise(cuts)]
    random.Random(1).shuffle(parts)
    assert receive.finish(sum(parts), data.size) == kernels.digest(data)


def test_what_follows_goes_elsewhere(ends):
    to, following = np.zeros(10, np.uint8), np.zeros(16, np.uint8)
    ends[0].sendall(b"a" * 10 + b"header")
    arrival = received(ends[1], to, following)
    assert (arrival.done, arrival.beyond) == (10, 6)
    assert to.tobytes() == b"a" * 10
    assert following[:6].tobytes() == b"header"


def test_nothing_is_digested_where_nobody_asks(ends):
    ends[0].sendall(b"x" * 100)
    arrival = received(ends[1], np.zeros(100, np.uint8), digested=100)
    assert arrival.sum == 0


def test_silence_and_a_trickle_end_at_their_time(ends):
    to, following, arrival = np.zeros(100, np.uint8), np.zeros(8, np.uint8), receive.Arrival()
    assert not receive.receive(ends[1].fileno(), to, following, 0, 0.05, arrival)
    ends[0].sendall(b"x")
    assert select.select([ends[1]], [], [], 30)[0]
    assert not receive.receive(ends[1].fileno(), to, following, 0, 0.0, arrival)  # something came, but the time is over
    assert arrival.done == 1


def test_whoever_reads_next_waits_for_one_byte_again(ends):
    """While many bytes are waited for the socket counts as unreadable below that; a header of a few bytes would never be seen."""
    to, following, arrival = np.zeros(3 << 20, np.uint8), np.zeros(8, np.uint8), receive.Arrival()
    ends[0].sendall(b"x" * 1000)
    assert not receive.receive(ends[1].fileno(), to, following, 0, 0.05, arrival)  # some of it may have come, not all
    assert ends[1].getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1


def test_a_peer_that_hangs_up(ends):
    ends[0].sendall(b"x" * 10)
    ends[0].close()
    to = np.zeros(100, np.uint8)
    with pytest.raises(ConnectionError):
        received(ends[1], to)
    assert to.tobytes() == b"x" * 10 + bytes(90)

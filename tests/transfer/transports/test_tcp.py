"""tcp:// keeps the rules of all transports, with and without TLS."""

import asyncio
import contextlib
import fcntl
import gc
import socket
import struct
import weakref

import numpy as np
import pytest
import uvloop
from net_subject import SECRET, NetSubject

from pdserve.transfer.transports import conformance, streams
from pdserve.transfer.transports.base import Local, PeerRefused
from pdserve.transfer.transports.conformance import cancelling, pushing
from pdserve.transfer.transports.conformance.ends import RecordingService, end, paired, pieces, raised, soon
from pdserve.transfer.transports.plane import Limits
from pdserve.transfer.transports.security import Security
from pdserve.transfer.transports.tcp import TcpTransport


def tcp(streams=3, limits=None, security=None):
    return NetSubject(lambda local: TcpTransport(local, security or Security(SECRET), limits or Limits(), streams))


@pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
def test_rule(rule):
    conformance.run(rule, tcp())


@pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
def test_rule_with_mutual_tls(rule, certificates):
    def make(local):
        cert, key = certificates[local.name if local.name in ("a", "b") else "a"]
        return TcpTransport(local, Security(SECRET, cert, key, certificates["ca"][0]), Limits(), 2)

    conformance.run(rule, NetSubject(make))


@pytest.mark.parametrize(
    "rule",
    [cancelling.whatever_is_cancelled_when_the_rest_arrives, pushing.pieces_of_all_sizes_arrive_whole],
    ids=conformance.name_of,
)
def test_rule_on_uvloop(rule):
    """The daemon's loop."""
    subject = tcp()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(rule(subject))
    subject.close()


def test_no_more_is_under_way_than_the_receiver_allows():
    """The window is the receiver's: with the bytes stuck, no sender has taken more of the arena than that."""
    limits = Limits(window_bytes=1 << 20)

    async def test(subject):
        async with paired(subject) as pair:
            subject.stall("a", "b")
            push = asyncio.create_task(pair.there.push(pieces(pair.a, [8 << 20]), soon()))
            await pair.b.service.until(lambda: pair.there.stats()["credit_bytes"] == 0)
            await asyncio.sleep(0.1)  # somebody who took too much would do it now
            assert pair.there.stats()["queued_bytes"] == 7 << 20
            subject.resume("a", "b")
            assert all(o.ok for o in await push)
            assert pair.there.stats()["queued_bytes"] == 0

    conformance.run(test, tcp(limits=limits))


def test_digests_are_left_to_the_reader_where_wanted():
    async def test(subject):
        async with paired(subject) as pair:
            (bad,) = pieces(pair.a, [100_000])
            pair.a.arena[bad.offset] ^= 1
            assert (await pair.there.push([bad], soon()))[0].ok

    conformance.run(test, tcp(limits=Limits(verify=False)))


def test_streams_come_from_the_dialler():
    async def test(subject):
        async with paired(subject) as pair:
            await pair.there.push(pieces(pair.a, [2 << 20]), soon())
            assert pair.there.stats()["streams"] == 5
            await pair.b.service.until(lambda: pair.back.stats()["streams"] == 5)

    conformance.run(test, tcp(streams=5))


def test_a_daemon_does_not_talk_to_its_own_name(security):
    async def test(subject):
        one, other = end(subject, "same", 1 << 20), end(subject, "same", 1 << 20)
        try:
            bound = await one.transport.listen(subject.url("same"), one.service)
            error = await raised(PeerRefused, other.transport.connect(bound, other.service, soon()))
            assert "own name" in str(error)
        finally:
            await one.transport.close()
            await other.transport.close()

    conformance.run(test, tcp())


def test_two_transports_of_one_daemon_share_an_arena(security):
    """Nothing is global: a daemon may hold several."""

    async def test(subject):
        arena = np.zeros(4 << 20, np.uint8)
        service = RecordingService(arena)
        one, two = (TcpTransport(Local("x", arena), security, Limits(), 1) for _ in range(2))
        b = end(subject, "b")
        try:
            bound = await b.transport.listen(subject.url("b"), b.service)
            for transport in (one, two):
                connection = await transport.connect(bound, service, soon())
                assert await connection.call(b"hello", soon()) == b"hello"
        finally:
            for transport in (one, two, b.transport):
                await transport.close()

    conformance.run(test, tcp())


def test_the_kernel_is_not_given_more_than_it_can_send_soon():
    """What it holds unsent is sent by whichever core an acknowledgement comes in on, and packets overtake each other."""
    bytes_not_sent = 0x894B  # SIOCOUTQNSD
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        two, _ = server.accept()
    with one, two:
        streams.prepare(one)
        one.setblocking(False)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)  # room for much more
        with contextlib.suppress(BlockingIOError):
            while True:  # until it takes no more; nobody reads
                one.send(bytes(64 << 10))
        unsent = struct.unpack("i", fcntl.ioctl(one, bytes_not_sent, bytes(4)))[0]
    assert 0 < unsent < 1 << 20


def test_a_closed_connection_keeps_no_buffers():
    """Sessions are in cycles, which a daemon collects seldom; what is large in them goes at once."""

    async def test(subject):
        gc.disable()
        try:
            async with paired(subject) as pair:
                streams = [weakref.ref(s) for c in (pair.there, pair.back) for s in c.plane._streams]
                assert len(streams) >= 3
                await pair.there.close()
                await pair.b.service.closing()
            await pair.b.service.until(lambda: not any(stream() for stream in streams))
        finally:
            gc.enable()

    conformance.run(test, tcp())

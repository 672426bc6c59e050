"""Who is let in, who is not, and what it costs to find out."""

import asyncio
import contextlib
import gc
import os
import random
import socket
import threading
import time
import tracemalloc
from urllib.parse import urlsplit

import numpy as np
import pytest
from net_subject import SECRET

from pdserve.errors import ConfigError, ProtocolError, StartError
from pdserve.transfer.transports import door
from pdserve.transfer.transports import handshake as h
from pdserve.transfer.transports.base import DeadlinePassed, Local, PeerRefused
from pdserve.transfer.transports.conformance.ends import RecordingService, raised, soon
from pdserve.transfer.transports.listener import MAX_PENDING_EACH, Gate
from pdserve.transfer.transports.net import address_of
from pdserve.transfer.transports.plane import Limits
from pdserve.transfer.transports.security import Security
from pdserve.transfer.transports.tcp import TcpTransport


def transport(name, security=None, streams=1):
    arena = np.zeros(1 << 20, np.uint8)
    made = TcpTransport(Local(name, arena), security or Security(SECRET), Limits(), streams)
    return made, RecordingService(arena)


def serving(test, security=None):
    """Runs test(port, connect) beside a listening daemon; connect(security) is an honest peer's attempt."""

    async def main():
        b, service = transport("b", security)
        url = await b.listen("tcp://127.0.0.1:0", service)

        async def connect(with_security=None, name="a"):
            a, theirs = transport(name, with_security or security)
            try:
                connection = await a.connect(url, theirs, soon())
                assert await connection.call(b"hello", soon()) == b"hello"
            finally:
                await a.close()

        try:
            async with asyncio.timeout(240):
                await test(urlsplit(url).port, connect)
        finally:
            await b.close()

    asyncio.run(main())


async def talk(port, data, read=True):
    """What the daemon says to these bytes, until it hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    answer = b""
    with contextlib.suppress(ConnectionError):
        await writer.drain()
        answer = await reader.read() if read else b""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return answer


# ---- in words ----


def test_another_secret_is_said_so():
    async def test(port, connect):
        error = await raised(PeerRefused, connect(Security(b"x" * 32)))
        assert "shared secret" in str(error)
        await connect()

    serving(test)


def test_a_listener_without_the_secret_is_not_trusted():
    """It lets everybody in and hopes to be talked to."""

    async def main():
        loop = asyncio.get_running_loop()
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)

        async def impostor():
            sock, _ = await loop.sock_accept(listening)
            sock.setblocking(False)
            wire = door.Wire(sock)
            await wire.read(h.GREETING_BYTES)
            await wire.write(h.greeting(False))
            await wire.read_frame()
            await wire.write(h.encode(h.Challenge("b", h.nonce(), 1 << 20)))
            proof = h.decode_proof(await wire.read_frame())
            await wire.write(h.encode(h.Welcome(proof.mac, b"s" * 16)))  # reflects what it was given
            return sock

        task = asyncio.create_task(impostor())
        a, service = transport("a")
        url = f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        error = await raised(PeerRefused, a.connect(url, service, soon()))
        assert "does not know the shared secret" in str(error)
        (await task).close()
        listening.close()
        await a.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (h.greeting(False, version=9), "version 9"),
        (h.greeting(True), "wants TLS"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 99, "not a pdserve daemon"),
        (b"", "hung up"),
    ],
)
def test_a_stranger_at_the_other_end_is_named(answer, words):
    async def main():
        async def stranger(reader, writer):
            await reader.readexactly(h.GREETING_BYTES)
            writer.write(answer)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(stranger, "127.0.0.1", 0)
        a, service = transport("a")
        url = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert words in str(await raised(PeerRefused, a.connect(url, service, soon())))
        server.close()
        await a.close()

    asyncio.run(main())


def test_what_the_port_says_to_others():
    async def test(port, connect):
        assert (await talk(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")).startswith(b"pdserve-transport 1 plain")
        assert (await talk(port, h.greeting(False, version=7))).startswith(b"pdserve-transport 1 plain")
        await connect()

    serving(test)


def test_names():
    async def test(port, connect):
        assert "own name" in str(await raised(PeerRefused, connect(name="b")))

    serving(test)


def test_a_port_that_is_taken(security):
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            b, service = transport("b")
            with pytest.raises(StartError, match="cannot listen"):
                await b.listen(f"tcp://127.0.0.1:{taken.getsockname()[1]}", service)
            await b.close()

    asyncio.run(main())


@pytest.mark.parametrize("url", ["tcp://:7400", "tcp://10.0.0.5", "ucx://h:1", "tcp://h:99999", "nonsense"])
def test_an_address_is_explicit(url):
    with pytest.raises(ConfigError, match=r"peers\.url"):
        address_of(url, "tcp")


def test_secrets_and_files_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="openssl rand"):
        Security(b"short")
    with pytest.raises(ConfigError, match="belong together"):
        Security(SECRET, cert="x")
    with pytest.raises(ConfigError, match="no file"):
        Security(SECRET, ca=str(tmp_path / "none"))
    assert SECRET.decode() not in repr(Security(SECRET))


# ---- TLS ----


def of(certificates, name, ca=True):
    cert, key = certificates[name]
    return Security(SECRET, cert, key, certificates["ca"][0] if ca else "")


def test_tls_with_and_without_a_ca(certificates):
    async def test(port, connect):
        await connect(of(certificates, "a"))
        assert "TLS" in str(await raised(PeerRefused, connect(of(certificates, "stranger"))))
        error = await raised(PeerRefused, connect(Security(SECRET)))
        assert "wants TLS" in str(error)

    serving(test, of(certificates, "b"))

    async def without(port, connect):
        await connect(of(certificates, "stranger", ca=False))  # the secret decides
        assert "shared secret" in str(await raised(PeerRefused, connect(Security(b"y" * 20, *certificates["a"]))))

    serving(without, of(certificates, "b", ca=False))


def test_somebody_in_between_with_another_certificate_is_noticed(certificates):
    """Without a CA any certificate is taken, but the proof covers the one that was seen."""

    async def test(port, connect):
        import ssl

        inner = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        inner.check_hostname, inner.verify_mode = False, ssl.CERT_NONE
        outer = Security(SECRET, *certificates["stranger"]).context(True)

        async def between(reader, writer):
            """Speaks TLS to both sides and passes on what is inside."""
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
            there_writer.write(await reader.readexactly(h.GREETING_BYTES))
            writer.write(await there_reader.readexactly(h.GREETING_BYTES))
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await asyncio.gather(there_writer.start_tls(inner), writer.start_tls(outer))
                await asyncio.gather(pass_on(reader, there_writer), pass_on(there_reader, writer))

        async def pass_on(reader, writer):
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while data := await reader.read(1 << 16):
                    writer.write(data)
                    await writer.drain()
            writer.close()

        server = await asyncio.start_server(between, "127.0.0.1", 0)
        a, service = transport("a", of(certificates, "a", ca=False))
        url = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert "shared secret" in str(await raised(PeerRefused, a.connect(url, service, soon())))
        await a.close()
        server.close()
        await asyncio.sleep(0.1)

    serving(test, of(certificates, "b", ca=False))


# ---- attackers ----


def test_a_recorded_handshake_is_of_no_use():
    async def test(port, connect):
        said = []

        async def record(reader, writer):
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)

            async def one_way():
                while data := await reader.read(1 << 16):
                    said.append(data)
                    there_writer.write(data)
                there_writer.close()

            async def other_way():
                while data := await there_reader.read(1 << 16):
                    writer.write(data)
                writer.close()

            await asyncio.gather(one_way(), other_way())

        server = await asyncio.start_server(record, "127.0.0.1", 0)
        a, service = transport("a")
        connection = await a.connect(f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}", service, soon())
        await connection.close()
        await a.close()
        server.close()
        assert len(b"".join(said)) > 200
        answer = await talk(port, b"".join(said))
        assert b"shared secret" in answer
        await connect()

    serving(test)


def test_random_bytes_and_port_scans_do_no_harm():
    async def test(port, connect):
        rng = random.Random(3)
        valid = h.greeting(False) + h.encode(h.Hello("x", h.nonce(), "tcp", "control", b"", 1 << 20))
        for i in range(150):
            data = rng.randbytes(rng.randint(0, 300))
            if i % 3 == 0:
                data = h.greeting(False) + data
            elif i % 3 == 1:
                cut = rng.randrange(len(valid))
                data = valid[:cut] + bytes([rng.randrange(256)]) + valid[cut + 1 :]
            await talk(port, data, read=False)
        await connect()

    serving(test)


def test_a_frame_that_is_too_long_is_not_even_read():
    async def test(port, connect):
        answer = await talk(port, h.greeting(False) + (h.MAX_FRAME + 1).to_bytes(2, "little"))
        assert answer == h.greeting(False)
        await connect()

    serving(test)


def test_those_who_do_not_finish_make_room(monkeypatch):
    """A flood of connections that never prove anything: bounded, and honest peers get in all the while."""

    async def test(port, connect):
        flood = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5 * MAX_PENDING_EACH)]
        await connect()
        for _, writer in flood[::2]:
            writer.write(h.greeting(False)[:20])
        await connect()
        gone = [reader.at_eof() or (await asyncio.wait_for(reader.read(), 30)) == b"" for reader, _ in flood[:10]]
        assert all(gone)
        for _, writer in flood:
            writer.close()

    serving(test)


def test_a_slow_sender_is_shown_out(monkeypatch):
    async def test(port, connect):
        monkeypatch.setattr(door, "GREET_S", 0.3)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        sent = 0
        with contextlib.suppress(ConnectionError):
            for byte in h.greeting(False):
                writer.write(bytes([byte]))
                sent += 1
                await asyncio.sleep(0.1)
                if reader.at_eof() or reader.exception():  # the latter where a byte came just after the hanging up
                    break
            assert await reader.read() == b""
        assert sent < h.GREETING_BYTES
        writer.close()
        monkeypatch.undo()
        await connect()

    serving(test)


def test_nothing_is_left_of_those_turned_away():
    async def test(port, connect):
        async def round_of_attacks():
            for data in (b"", b"GET / HTTP/1.0\r\n\r\n" * 3, h.greeting(False) + b"\xff" * 200, os.urandom(500)):
                await asyncio.gather(*(talk(port, data, read=False) for _ in range(25)))
            await raised(PeerRefused, connect(Security(b"z" * 16)))
            await asyncio.sleep(0.2)
            gc.collect()

        await round_of_attacks()
        descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        tracemalloc.start()
        await round_of_attacks()
        first = tracemalloc.get_traced_memory()[0]
        for _ in range(3):
            await round_of_attacks()

        def grown():
            gc.collect()
            now = len(os.listdir("/proc/self/fd")), threading.active_count(), tracemalloc.get_traced_memory()[0]
            return [
                n - b
                for n, b, room in zip(now, (descriptors, threads, first), (2, 0, 200_000), strict=True)
                if n > b + room
            ]

        ends = time.monotonic() + 60  # the daemon lets the last of them go in its own time
        while left := grown():
            assert time.monotonic() < ends, f"descriptors, threads or bytes more after 300 attacks: {left}"
            await asyncio.sleep(0.1)
        tracemalloc.stop()
        await connect()

    serving(test)


def test_a_peer_that_breaks_the_protocol_is_lost_not_trusted():
    """After the proof: a message of more than is allowed, and one that is none."""

    async def test(port, connect):
        for garbage in ((1 << 30).to_bytes(4, "little"), (5).to_bytes(4, "little") + b"\xc1garb"):
            hello = h.Hello("a", h.nonce(), "tcp", "control", b"", 1 << 20)
            admitted = await door.dial("127.0.0.1", port, Security(SECRET), None, hello, soon())
            await admitted.wire.write(garbage)
            with contextlib.suppress(Exception):
                while True:
                    await admitted.wire.read(1)
            admitted.wire.sock.close()
        await connect()

    serving(test)


def test_a_stream_needs_a_session():
    async def test(port, connect):
        hello = h.Hello("a", h.nonce(), "tcp", "stream", b"q" * 16, 1 << 20)
        error = await raised(PeerRefused, door.dial("127.0.0.1", port, Security(SECRET), None, hello, soon()))
        assert "no such session" in str(error)

    serving(test)


def test_a_peer_that_accepts_and_says_nothing_costs_one_deadline():
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as silent:
            a, service = transport("a")
            url = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
            error = await raised(DeadlinePassed, a.connect(url, service, soon(1.0)))
            assert "took the connection, but did not answer" in str(error)
            await a.close()

    asyncio.run(main())


# ---- parts ----


def test_the_gate_pushes_out_the_oldest():
    gate = Gate(most=4, most_each=2)
    assert gate.enter("a1", "A") is None
    assert gate.enter("b1", "B") is None
    assert gate.enter("a2", "A") is None
    assert gate.enter("a3", "A") == "a1"  # its own address' oldest, not somebody else's
    assert gate.enter("c1", "C") is None
    assert gate.enter("d1", "D") == "b1"
    gate.leave("c1")
    gate.leave("never there")
    assert len(gate) == 3


def test_proofs_are_of_one_side_and_one_conversation():
    hello = h.Hello("a", h.nonce(), "tcp", "control", b"", 1 << 20)
    challenge = h.Challenge("b", h.nonce(), 1 << 20)
    mine = h.mac(SECRET, "dialler", hello, challenge, b"")
    others = [
        h.mac(SECRET, "listener", hello, challenge, b""),
        h.mac(SECRET, "dialler", hello, challenge, b"certificate"),
        h.mac(SECRET, "dialler", hello, h.Challenge("b", h.nonce(), 1 << 20), b""),
        h.mac(SECRET, "dialler", h.Hello("c", hello.nonce, "tcp", "control", b"", 1 << 20), challenge, b""),
        h.mac(b"another secret!!", "dialler", hello, challenge, b""),
    ]
    assert h.proves(h.mac(SECRET, "dialler", hello, challenge, b""), mine)
    assert not any(h.proves(other, mine) for other in others)


def test_greetings():
    assert h.read_greeting(h.greeting(True)) == (1, True)
    assert h.read_greeting(h.greeting(False, version=12)) == (12, False)
    for wrong in (b"", b"x" * 32, h.greeting(False)[:-1], b"pdserve-transport one plain    \n"):
        with pytest.raises(ProtocolError):
            h.read_greeting(wrong)

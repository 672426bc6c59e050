"""Connections of one daemon beside one another, without sockets: whose turn it is, and what is left when one goes."""

import asyncio
import os

import pytest

from pdserve.errors import ProtocolError
from pdserve.transfer import connection, wire
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.connection import A_PART
from pdserve.transfer.daemon import Daemon

CHUNKS = 10 * A_PART + 3


def key(i):
    return i.to_bytes(32, "little")


class Transport:
    def __init__(self):
        self.reader, self.replies = wire.FrameReader(), []
        self.closing, self.reading = False, True

    def write(self, data):
        assert not self.closing
        self.replies += map(wire.decode_reply, self.reader.feed(data))

    def get_write_buffer_size(self):
        return 0

    def is_closing(self):
        return self.closing

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True

    def close(self):
        self.closing = True

    abort = close


class Client:
    def __init__(self, daemon):
        self.connection, self.transport = daemon.protocol(), Transport()
        self.connection.connection_made(self.transport)
        self.say(wire.Hello(wire.VERSION, f"client{self.connection.client}", 1))
        self.replies = self.transport.replies
        del self.replies[:]

    def say(self, *messages):
        self.connection.data_received(b"".join(map(wire.encode, messages)))

    async def answered(self, count):
        """Lets the loop turn until there are so many answers; how often it had to."""
        for turns in range(1000):
            if len(self.replies) >= count:
                return turns
            await asyncio.sleep(0)
        raise AssertionError(f"{len(self.replies)} answers")

    def gone(self):
        self.transport.closing = True
        self.connection.connection_lost(None)


def items(first=1, count=CHUNKS):
    return [wire.ReserveItem(key(i), b"", 0, 1, PAGE, 256) for i in range(first, first + count)]


@pytest.fixture
def daemon(monkeypatch):
    monkeypatch.setattr(connection, "A_TURN_S", 0.0)  # one part each
    made = Daemon(name=f"connection-{os.getpid()}", size=2 * CHUNKS * PAGE, chunk_tokens=256)
    yield made
    made.close()


def test_others_are_answered_between_the_parts_of_a_long_request(daemon):
    async def run():
        a, b = Client(daemon), Client(daemon)
        a.say(wire.Reserve(1, "w", items()))
        assert not a.transport.reading
        between = 0
        while not a.replies:
            b.say(wire.Ping(between + 1))
            between += 1
            assert len(b.replies) == between
            await asyncio.sleep(0)
        assert between >= 10
        assert a.transport.reading
        (reply,) = a.replies
        assert (reply.id, len({g.reservation for g in reply.grants})) == (1, CHUNKS)
        assert len({g.offset for g in reply.grants}) == CHUNKS
        a.say(wire.Commit(2, [wire.CommitItem(g.reservation, 7) for g in reply.grants]))
        assert await a.answered(2) >= 10
        assert a.replies[1] == wire.Ok(2, CHUNKS)
        b.say(wire.Lookup(99, [item.key for item in items()]))
        assert len(b.replies[-1].found) == CHUNKS
        a.gone()
        b.gone()

    asyncio.run(run())


def test_what_is_done_in_time_is_done_in_one_turn(daemon, monkeypatch):
    async def run():
        a = Client(daemon)
        a.say(wire.Reserve(1, "w", items()))
        assert [len(reply.grants) for reply in a.replies] == [CHUNKS]
        assert a.transport.reading
        a.gone()

    monkeypatch.setattr(connection, "A_TURN_S", 3600.0)
    asyncio.run(run())


def test_a_clients_own_requests_keep_their_order(daemon):
    async def run():
        a = Client(daemon)
        a.say(wire.Reserve(1, "w", items()), wire.Ping(2), wire.Reserve(3, "w", items(10**6, 40)), wire.Ping(4))
        await a.answered(4)
        assert [reply.id for reply in a.replies] == [1, 2, 3, 4]
        assert [len(a.replies[0].grants), len(a.replies[2].grants)] == [CHUNKS, 40]
        a.gone()

    asyncio.run(run())


def test_who_goes_in_the_middle_leaves_nothing_reserved(daemon):
    async def run():
        a = Client(daemon)
        a.say(wire.Reserve(1, "w", items()))
        assert 0 < daemon.store.stats()["reservations"] < CHUNKS
        a.gone()
        for _ in range(20):
            await asyncio.sleep(0)
        stats = daemon.store.stats()
        assert (stats["reservations"], stats["used_bytes"], stats["chunks"]) == (0, 0, 0)

    asyncio.run(run())


@pytest.mark.parametrize("refused", [True, False])
def test_an_error_in_the_middle_ends_the_connection(daemon, monkeypatch, refused):
    async def run():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: raised.append(context["exception"]))
        a = Client(daemon)
        a.say(wire.Reserve(1, "w", items()))

        def fail(message, client):
            raise ProtocolError("no") if refused else RuntimeError("a mistake of ours")

        monkeypatch.setattr(daemon, "answer", fail)
        await asyncio.sleep(0)
        assert a.transport.closing
        assert [type(reply) for reply in a.replies] == [wire.Refused] * refused
        a.gone()
        assert daemon.store.stats()["reservations"] == 0

    raised = []
    asyncio.run(run())
    assert [str(e) for e in raised] == ([] if refused else ["a mistake of ours"])

"""What every transport must do, one function per rule. An outside transport runs it too:

    @pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
    def test_rule(rule, subject):
        conformance.run(rule, subject)

Each rule brings up two daemons' ends of its own and takes them down again. No rule measures time: PATIENCE_S bounds a hang.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import numpy as np

from pdserve import kernels
from pdserve.chunk import KEY_BYTES
from pdserve.errors import PdserveError, ProtocolError
from pdserve.transfer.transports.base import (
    Connection,
    DeadlinePassed,
    Expected,
    Local,
    Offer,
    Outcome,
    PeerLost,
    PeerRefused,
    PeerUnreachable,
    Piece,
    Service,
    Slot,
    Transport,
)

#: longer than anything takes on a busy machine
PATIENCE_S = 60.0
#: what stands in memory that nobody may write into
_CANARY = 0xEE
_ARENA = 48 << 20


class Subject:
    """A transport under test and what can be done to the way between two ends. `None` where a fault cannot be arranged."""

    def make(self, local: Local) -> Transport:
        raise NotImplementedError

    def url(self, name: str) -> str:
        """Where the daemon `name` listens."""
        raise NotImplementedError

    def way(self, bound: str) -> str:
        """What the other end dials, given what listen() returned: through a relay, where faults need one."""
        return bound

    def nobody(self) -> str:
        """An address where nobody listens."""
        raise NotImplementedError

    def wedged(self) -> str | None:
        """An address that accepts and never answers."""
        return None

    def stall(self, sender: str, receiver: str) -> bool:
        """Bytes from one to the other stop somewhere; False: cannot be arranged."""
        return False

    def resume(self, sender: str, receiver: str) -> None:
        """The opposite."""

    def cut(self, one: str, other: str) -> bool:
        """Ends what is between the two, at once and from outside."""
        return False

    def close(self) -> None:
        """Takes relays and the like down."""


# ---- a daemon to test with ----


class RecordingService(Service):
    """Lends space of its arena from low to high, never twice, and keeps a record."""

    def __init__(self, arena: np.ndarray) -> None:
        self.arena = arena
        self.next = 0
        self.lent: list[Slot] = []
        self.outcomes: dict[Slot, Outcome] = {}
        self.offers: list[Offer] = []
        self.connections: list[Connection] = []
        self.closed_because: list[str] = []
        self.refuse: Callable[[Offer], str] = lambda offer: ""
        self.answer: Callable[[Connection, bytes], Awaitable[bytes]] = self._echo
        self.on_reserved: Callable[[Connection, list[Slot]], None] = lambda connection, slots: None
        self.changed = asyncio.Event()

    async def _echo(self, connection: Connection, payload: bytes) -> bytes:
        return payload

    def slot(self, length: int, context: object = None) -> Slot:
        offset = self.next
        self.next += -(-length // 64) * 64 + 64
        assert self.next <= self.arena.size, "the test's arena is too small"
        slot = Slot(offset, length, context)
        self.lent.append(slot)
        return slot

    def connected(self, connection: Connection) -> None:
        self.connections.append(connection)
        self.changed.set()

    def closed(self, connection: Connection, reason: str) -> None:
        self.closed_because.append(reason)
        self.changed.set()

    async def call(self, connection: Connection, payload: bytes) -> bytes:
        return await self.answer(connection, payload)

    def reserve(self, connection: Connection, offers: Sequence[Offer]) -> Sequence[Slot | str]:
        self.offers += offers
        answers = [self.refuse(offer) or self.slot(offer.length, offer) for offer in offers]
        self.on_reserved(connection, [a for a in answers if isinstance(a, Slot)])
        self.changed.set()
        return answers

    def done(self, connection: Connection, slot: Slot, outcome: Outcome) -> None:
        assert slot not in self.outcomes, f"done() twice for {slot}"
        self.outcomes[slot] = outcome
        if not outcome.ok:
            self.bytes_of(slot)[:] = _CANARY  # as if it were handed to somebody else now
        self.changed.set()

    def bytes_of(self, slot: Slot) -> np.ndarray:
        return self.arena[slot.offset : slot.offset + slot.length]

    def by_key(self) -> dict[tuple[bytes, int], Slot]:
        return {(slot.context.key, slot.context.shard): slot for slot in self.lent if isinstance(slot.context, Offer)}

    def check(self) -> None:
        """All that was lent has ended, and what did not arrive was left alone since."""
        assert set(self.outcomes) == set(self.lent), "a slot was not given back"
        for slot, outcome in self.outcomes.items():
            if not outcome.ok:
                assert (self.bytes_of(slot) == _CANARY).all(), f"bytes landed after done(): {outcome}"

    async def until(self, what: Callable[[], bool]) -> None:
        """Waits for it to be so."""
        while not what():
            self.changed.clear()
            if not what():
                async with asyncio.timeout(PATIENCE_S):
                    await self.changed.wait()

    async def ended(self, slot: Slot) -> None:
        await self.until(lambda: slot in self.outcomes)

    async def all_ended(self) -> None:
        await self.until(lambda: set(self.outcomes) == set(self.lent))

    async def closing(self) -> None:
        await self.until(lambda: bool(self.closed_because))


class End(NamedTuple):
    name: str
    arena: np.ndarray
    service: RecordingService
    transport: Transport


class Pair(NamedTuple):
    """a has dialled b: `there` is a's connection, `back` is b's."""

    a: End
    b: End
    there: Connection
    back: Connection

    def check(self) -> None:
        self.a.service.check()
        self.b.service.check()


def end(subject: Subject, name: str, size: int = _ARENA) -> End:
    arena = np.full(size, 0xA5, np.uint8)
    return End(name, arena, RecordingService(arena), subject.make(Local(name, arena)))


@asynccontextmanager
async def paired(subject: Subject) -> Any:
    a, b = end(subject, "a"), end(subject, "b")
    try:
        bound = await b.transport.listen(subject.url("b"), b.service)
        there = await a.transport.connect(subject.way(bound), a.service, soon())
        await b.service.until(lambda: bool(b.service.connections))
        yield Pair(a, b, there, b.service.connections[0])
    finally:
        await a.transport.close()
        await b.transport.close()


def soon(seconds: float = PATIENCE_S) -> float:
    return time.monotonic() + seconds


def pieces(source: End, sizes: Sequence[int], at: int = 0, meta: bytes = b"") -> list[Piece]:
    """Random bytes in the upper half of the arena (the lower is for slots), and the pieces that name them."""
    made = []
    offset = source.arena.size // 2 + at
    for i, size in enumerate(sizes):
        source.arena[offset : offset + size] = np.frombuffer(secrets.token_bytes(size), np.uint8)
        digest = kernels.digest(source.arena[offset : offset + size])
        made.append(Piece(secrets.token_bytes(KEY_BYTES), i % 3, offset, size, digest, meta=meta))
        offset += -(-size // 64) * 64
    assert offset <= source.arena.size, "the test's arena is too small"
    return made


def same(source: End, piece: Piece, target: End, slot: Slot) -> bool:
    sent = source.arena[piece.offset : piece.offset + piece.length]
    return bool((sent == target.service.bytes_of(slot)).all())


def landed(pair: Pair, sent: Sequence[Piece]) -> bool:
    slots = pair.b.service.by_key()
    return all(same(pair.a, piece, pair.b, slots[piece.key, piece.shard]) for piece in sent)


# ---- rules ----


async def pieces_of_all_sizes_arrive_whole(subject: Subject) -> None:
    async with paired(subject) as pair:
        sent = pieces(pair.a, [1, 7, 4095, 4096, 70001, 1 << 20, (1 << 20) + 1, 9 << 20])
        outcomes = await pair.there.push(sent, soon())
        assert [o.state for o in outcomes] == ["arrived"] * len(sent)
        assert landed(pair, sent)
        assert [o.digest for o in pair.b.service.offers] == [p.digest for p in sent]
        pair.check()


async def many_small_pieces_arrive_in_one_push(subject: Subject) -> None:
    async with paired(subject) as pair:
        sent = pieces(pair.a, [100 + i % 50 for i in range(3000)])
        assert all(o.ok for o in await pair.there.push(sent, soon()))
        assert landed(pair, sent)
        pair.check()


async def nothing_is_a_push_too(subject: Subject) -> None:
    async with paired(subject) as pair:
        assert await pair.there.push([], soon()) == []


async def either_end_may_push(subject: Subject) -> None:
    async with paired(subject) as pair:
        there, back = pieces(pair.a, [3 << 20, 5, 1 << 20]), pieces(pair.b, [2 << 20, 8193])
        both = await asyncio.gather(pair.there.push(there, soon()), pair.back.push(back, soon()))
        assert all(o.ok for outcomes in both for o in outcomes)
        assert landed(pair, there)
        slots = pair.a.service.by_key()
        assert all(same(pair.b, p, pair.a, slots[p.key, p.shard]) for p in back)
        pair.check()


async def pushes_at_once_do_not_mix(subject: Subject) -> None:
    async with paired(subject) as pair:
        batches = [pieces(pair.a, [1 << 20, 77, 300_000], at=i << 21) for i in range(8)]
        for outcomes in await asyncio.gather(*(pair.there.push(batch, soon()) for batch in batches)):
            assert all(o.ok for o in outcomes)
        assert all(landed(pair, batch) for batch in batches)
        pair.check()


async def what_is_refused_is_not_sent(subject: Subject) -> None:
    async with paired(subject) as pair:
        sent = pieces(pair.a, [5000] * 10, meta=b"whose it is")
        pair.b.service.refuse = lambda offer: "full today" if offer.key == sent[3].key else ""
        outcomes = await pair.there.push(sent, soon())
        assert outcomes[3] == Outcome("refused", "full today")
        assert [o.ok for o in outcomes].count(True) == 9
        assert {offer.meta for offer in pair.b.service.offers} == {b"whose it is"}
        pair.check()


async def what_was_asked_for_comes_to_the_slot_named(subject: Subject) -> None:
    """Pull: b lends slots, asks a in a message of its own, a pushes to the tickets without an offer."""
    async with paired(subject) as pair:
        sent = pieces(pair.a, [1 << 20, 4096, 3])

        async def send(connection: Connection, payload: bytes) -> bytes:
            tickets = [int(t) for t in payload.split()]
            named = [Piece(p.key, p.shard, p.offset, p.length, p.digest, t) for p, t in zip(sent, tickets, strict=True)]
            outcomes = await connection.push(named, soon())
            return b" ".join(o.state.encode() for o in outcomes)

        pair.a.service.answer = send
        slots = [pair.b.service.slot(p.length) for p in sent]
        wanted = [Expected(p.key, p.shard, p.digest, s) for p, s in zip(sent, slots, strict=True)]
        tickets = pair.back.expect(wanted, soon())
        assert len(set(tickets)) == 3
        answer = await pair.back.call(b" ".join(b"%d" % t for t in tickets), soon())
        assert answer == b"arrived arrived arrived"
        await pair.b.service.until(lambda: len(pair.b.service.outcomes) == 3)
        assert all(same(pair.a, p, pair.b, s) for p, s in zip(sent, slots, strict=True))
        assert not pair.b.service.offers
        pair.check()


async def messages_are_answered_both_ways(subject: Subject) -> None:
    async with paired(subject) as pair:
        big = secrets.token_bytes(1 << 20)
        assert await pair.there.call(big, soon()) == big
        texts = [b"message %d" % i for i in range(200)]
        calls = [c.call(t, soon()) for c in (pair.there, pair.back) for t in texts]
        assert await asyncio.gather(*calls) == texts + texts


async def an_error_reaches_the_caller_in_words(subject: Subject) -> None:
    async with paired(subject) as pair:

        async def fail(connection: Connection, payload: bytes) -> bytes:
            raise ValueError("no such model here")

        pair.b.service.answer = fail
        error = await raised(PeerRefused, pair.there.call(b"?", soon()))
        assert "no such model here" in str(error)
        assert await pair.back.call(b"still there", soon()) == b"still there"


async def a_message_that_nobody_answers_ends_at_its_deadline(subject: Subject) -> None:
    async with paired(subject) as pair:

        async def sleep(connection: Connection, payload: bytes) -> bytes:
            if payload == b"sleep":
                await asyncio.sleep(PATIENCE_S)
            return payload

        pair.b.service.answer = sleep
        await raised(DeadlinePassed, pair.there.call(b"sleep", soon(0.2)))
        await raised(DeadlinePassed, pair.there.call(b"awake", soon(-1)))
        assert await pair.there.call(b"awake", soon()) == b"awake"


async def too_large_a_message_is_refused_here(subject: Subject) -> None:
    async with paired(subject) as pair:
        await raised(ProtocolError, pair.there.call(bytes((1 << 20) + 1), soon()))
        assert await pair.there.call(b"fine", soon()) == b"fine"


async def small_messages_pass_bytes_that_are_stuck(subject: Subject) -> None:
    async with paired(subject) as pair:
        if not subject.stall("a", "b"):
            return
        push = asyncio.create_task(pair.there.push(pieces(pair.a, [8 << 20]), soon()))
        await pair.b.service.until(lambda: bool(pair.b.service.offers))
        assert await pair.there.call(b"quick", soon()) == b"quick"
        assert not push.done()
        subject.resume("a", "b")
        assert all(o.ok for o in await push)


async def changed_bytes_are_noticed(subject: Subject) -> None:
    async with paired(subject) as pair:
        good, bad = pieces(pair.a, [200_000, 100_000])
        pair.a.arena[bad.offset + 5] ^= 1
        outcomes = await pair.there.push([good, bad], soon())
        assert [o.state for o in outcomes] == ["arrived", "corrupt"]
        pair.check()


async def a_ticket_for_another_piece_ends_the_connection(subject: Subject) -> None:
    async with paired(subject) as pair:
        (sent,) = pieces(pair.a, [5000])
        other = secrets.token_bytes(KEY_BYTES)
        slot = pair.b.service.slot(sent.length)
        (ticket,) = pair.back.expect([Expected(other, sent.shard, 0, slot)], soon())
        wrong = Piece(sent.key, sent.shard, sent.offset, sent.length, sent.digest, ticket)
        await raised(PeerLost, pair.there.push([wrong], soon()))
        await pair.b.service.closing()
        assert pair.b.service.outcomes[slot].state == "lost"
        pair.check()


async def a_ticket_of_nobody_ends_the_connection(subject: Subject) -> None:
    async with paired(subject) as pair:
        (sent,) = pieces(pair.a, [5000])
        made_up = Piece(sent.key, sent.shard, sent.offset, sent.length, sent.digest, 12345)
        await raised(PeerLost, pair.there.push([made_up], soon()))
        await pair.b.service.closing()


async def what_lies_outside_the_arena_is_refused(subject: Subject) -> None:
    async with paired(subject) as pair:
        size = pair.a.arena.size
        key = secrets.token_bytes(KEY_BYTES)
        for offset, length in ((size - 1, 2), (-1, 5), (0, 0), (size, 1)):
            await raised(ProtocolError, pair.there.push([Piece(key, 0, offset, length, 0)], soon()))
            try:
                pair.there.expect([Expected(key, 0, 0, Slot(offset, length))], soon())
            except ProtocolError:
                continue
            raise AssertionError(f"lent {length} bytes at {offset} of {size}")


async def a_cancelled_slot_is_left_alone(subject: Subject) -> None:
    """The bytes come after the slot was given to somebody else."""
    async with paired(subject) as pair:
        sent = pieces(pair.a, [300_000, 300_000])
        slots = [pair.b.service.slot(p.length) for p in sent]
        tickets = pair.back.expect([Expected(p.key, p.shard, 0, s) for p, s in zip(sent, slots, strict=True)], soon())
        pair.back.cancel([slots[0]], "the request was aborted")
        await pair.b.service.until(lambda: slots[0] in pair.b.service.outcomes)
        assert pair.b.service.outcomes[slots[0]] == Outcome("cancelled", "the request was aborted")
        named = [Piece(p.key, p.shard, p.offset, p.length, p.digest, t) for p, t in zip(sent, tickets, strict=True)]
        late, good = await pair.there.push(named, soon(3))
        assert good.ok
        assert not late.ok
        assert same(pair.a, sent[1], pair.b, slots[1])
        pair.check()


async def a_slot_cancelled_while_it_is_written_is_left_alone(subject: Subject) -> None:
    async with paired(subject) as pair:
        if not subject.stall("a", "b"):
            return
        sent = pieces(pair.a, [9 << 20, 9 << 20])
        push = asyncio.create_task(pair.there.push(sent, soon()))
        await pair.b.service.until(lambda: len(pair.b.service.lent) == 2)
        await asyncio.sleep(0.3)  # some bytes are on their way, some perhaps in the slot
        pair.back.cancel([pair.b.service.lent[0]], "aborted")
        await pair.b.service.ended(pair.b.service.lent[0])
        subject.resume("a", "b")
        try:
            outcomes = await push
        except PeerLost:  # a transport that cannot leave a slot otherwise may end the connection
            await pair.b.service.closing()
            pair.check()
            return
        assert [o.state for o in outcomes] == ["cancelled", "arrived"]
        pair.check()
        assert landed(pair, sent[1:])
        again = pieces(pair.a, [50_000])
        assert all(o.ok for o in await pair.there.push(again, soon()))


async def an_expected_piece_that_never_comes_is_given_back(subject: Subject) -> None:
    async with paired(subject) as pair:
        slot = pair.b.service.slot(5000)
        pair.back.expect([Expected(secrets.token_bytes(KEY_BYTES), 0, 0, slot)], soon(0.1))
        await pair.b.service.until(lambda: slot in pair.b.service.outcomes)
        assert pair.b.service.outcomes[slot].state == "late"
        pair.check()


async def a_push_ends_at_its_deadline(subject: Subject) -> None:
    async with paired(subject) as pair:
        if not subject.stall("a", "b"):
            return
        sent = pieces(pair.a, [9 << 20, 9 << 20])
        try:
            outcomes = await pair.there.push(sent, soon(0.5))
        except PeerLost:  # a stream that was stuck in the middle of a segment had to be cut
            outcomes = []
        assert {o.state for o in outcomes} <= {"late", "lost", "cancelled"}
        pair.a.arena[:] = 1  # nobody reads it any more
        await pair.b.service.all_ended()
        subject.resume("a", "b")
        await asyncio.sleep(0.3)  # for bytes that come late
        await pair.b.service.all_ended()
        pair.check()


async def a_push_may_be_cancelled(subject: Subject) -> None:
    async with paired(subject) as pair:
        if not subject.stall("a", "b"):
            return
        push = asyncio.create_task(pair.there.push(pieces(pair.a, [9 << 20, 70_000]), soon()))
        await pair.b.service.until(lambda: bool(pair.b.service.lent))
        push.cancel()
        await raised(asyncio.CancelledError, push)
        await pair.b.service.all_ended()
        subject.resume("a", "b")
        await asyncio.sleep(0.3)
        pair.check()


async def a_way_cut_mid_transfer_ends_everything(subject: Subject) -> None:
    async with paired(subject) as pair:
        if not subject.stall("a", "b"):
            return
        push = asyncio.create_task(pair.there.push(pieces(pair.a, [9 << 20, 70_000]), soon()))
        call = asyncio.create_task(_never(pair))
        await pair.b.service.until(lambda: len(pair.b.service.lent) == 2)
        if not subject.cut("a", "b"):
            push.cancel()
            return
        await raised(PeerLost, push)
        await raised(PeerLost, call)
        for one in (pair.a, pair.b):
            await one.service.closing()
        assert pair.there.closed
        assert pair.back.closed
        await raised(PeerLost, pair.there.call(b"?", soon()))
        pair.check()


async def _never(pair: Pair) -> bytes:
    async def sleep(connection: Connection, payload: bytes) -> bytes:
        await asyncio.sleep(PATIENCE_S)
        return b""

    pair.b.service.answer = sleep
    return await pair.there.call(b"sleep", soon())


async def closing_ends_everything(subject: Subject) -> None:
    async with paired(subject) as pair:
        slot = pair.b.service.slot(5000)
        pair.back.expect([Expected(secrets.token_bytes(KEY_BYTES), 0, 0, slot)], soon())
        await pair.back.close("enough")
        assert pair.b.service.outcomes[slot].state == "lost"
        await pair.a.service.closing()
        assert "enough" in pair.a.service.closed_because[0]
        assert pair.b.service.closed_because == ["enough"]
        await raised(PeerLost, pair.there.push(pieces(pair.a, [5]), soon()))
        await raised(PeerLost, pair.back.call(b"", soon()))
        pair.check()


async def nobody_listening_is_said_so(subject: Subject) -> None:
    a = end(subject, "a", 1 << 20)
    try:
        await raised(PeerUnreachable, a.transport.connect(subject.nobody(), a.service, soon()))
    finally:
        await a.transport.close()


async def a_wedged_peer_costs_one_deadline(subject: Subject) -> None:
    a = end(subject, "a", 1 << 20)
    try:
        url = subject.wedged()
        if url is not None:
            await raised(DeadlinePassed, a.transport.connect(url, a.service, soon(0.3)))
    finally:
        await a.transport.close()


async def a_connection_can_be_made_again(subject: Subject) -> None:
    async with paired(subject) as pair:
        await pair.there.close()
        await pair.b.service.closing()
    for _ in range(3):  # the same address at once: a restarted daemon
        async with paired(subject) as pair:
            sent = pieces(pair.a, [100_000])
            assert all(o.ok for o in await pair.there.push(sent, soon()))


async def the_books_say_what_went(subject: Subject) -> None:
    async with paired(subject) as pair:
        await pair.there.push(pieces(pair.a, [1 << 20, 5000]), soon())
        sent, received = pair.there.stats(), pair.back.stats()
        assert sent["sent_bytes"] == received["received_bytes"] == (1 << 20) + 5000
        assert received["open_tickets"] == 0
        assert {"drained_bytes", "streams", "credit_bytes"} <= set(sent)
        assert pair.there.peer == "b"
        assert pair.back.peer == "a"


async def closing_leaves_no_thread(subject: Subject) -> None:
    before = {t for t in threading.enumerate() if t.is_alive()}
    async with paired(subject) as pair:
        await pair.there.push(pieces(pair.a, [1 << 20]), soon())
    ends = time.monotonic() + PATIENCE_S
    while left := {t for t in threading.enumerate() if t.is_alive()} - before - _lasting(subject):
        assert time.monotonic() < ends, f"left behind: {left}"
        await asyncio.sleep(0.02)


def _lasting(subject: Subject) -> set[threading.Thread]:
    names: tuple[str, ...] = getattr(subject, "lasting_threads", ())
    return {t for t in threading.enumerate() if names and t.name.startswith(names)}


async def whatever_is_cancelled_when_the_rest_arrives(subject: Subject) -> None:
    """Pushes from both sides, slots and pushes cancelled at random: each slot ends once, whole or left alone."""
    rng = random.Random(5)
    async with paired(subject) as pair:
        for one in (pair.a, pair.b):
            one.service.on_reserved = lambda connection, slots: _cancel_some(rng, connection, slots)
        jobs = []
        for i in range(40):
            source, connection = (pair.a, pair.there) if i % 2 else (pair.b, pair.back)
            sizes = [rng.choice([10, 5000, 60_000, 300_000]) for _ in range(4)]
            sent = pieces(source, sizes, at=i // 2 % 10 * 1_250_000)
            jobs.append((source, sent, asyncio.create_task(connection.push(sent, soon()))))
            if rng.random() < 0.3:
                asyncio.get_running_loop().call_later(rng.random() * 0.01, jobs[-1][2].cancel)
            await asyncio.sleep(rng.random() * 0.01)
            if len(jobs) == 20:  # beyond that, the sources' places are used again
                await _settle(pair, jobs)
        await _settle(pair, jobs)
        pair.check()


def _cancel_some(rng: random.Random, connection: Connection, slots: list[Slot]) -> None:
    chosen = [slot for slot in slots if rng.random() < 0.2]
    if chosen:
        asyncio.get_running_loop().call_later(rng.random() * 0.01, connection.cancel, chosen, "not wanted")


async def _settle(pair: Pair, jobs: list[Any]) -> None:
    for source, sent, task in jobs:
        target = pair.b if source is pair.a else pair.a
        try:
            outcomes = await task
        except asyncio.CancelledError:
            continue
        slots = target.service.by_key()
        for piece, outcome in zip(sent, outcomes, strict=True):
            slot = slots[piece.key, piece.shard]
            await target.service.ended(slot)
            assert outcome.ok == target.service.outcomes[slot].ok
            assert not outcome.ok or same(source, piece, target, slot)
    jobs.clear()
    for one in (pair.a, pair.b):
        await one.service.all_ended()


async def raised(kind: type[BaseException], waiting: Awaitable[Any]) -> BaseException:
    """The error of that kind that it ends with."""
    try:
        result = await waiting
    except kind as e:
        return e
    except PdserveError as e:
        raise AssertionError(f"{kind.__name__} was due, not {e!r}") from e
    raise AssertionError(f"{kind.__name__} was due, but it returned {result!r}")


Rule = Callable[[Subject], Awaitable[None]]

RULES: tuple[Rule, ...] = (
    pieces_of_all_sizes_arrive_whole,
    many_small_pieces_arrive_in_one_push,
    nothing_is_a_push_too,
    either_end_may_push,
    pushes_at_once_do_not_mix,
    what_is_refused_is_not_sent,
    what_was_asked_for_comes_to_the_slot_named,
    messages_are_answered_both_ways,
    an_error_reaches_the_caller_in_words,
    a_message_that_nobody_answers_ends_at_its_deadline,
    too_large_a_message_is_refused_here,
    small_messages_pass_bytes_that_are_stuck,
    changed_bytes_are_noticed,
    a_ticket_for_another_piece_ends_the_connection,
    a_ticket_of_nobody_ends_the_connection,
    what_lies_outside_the_arena_is_refused,
    a_cancelled_slot_is_left_alone,
    a_slot_cancelled_while_it_is_written_is_left_alone,
    an_expected_piece_that_never_comes_is_given_back,
    a_push_ends_at_its_deadline,
    a_push_may_be_cancelled,
    a_way_cut_mid_transfer_ends_everything,
    closing_ends_everything,
    nobody_listening_is_said_so,
    a_wedged_peer_costs_one_deadline,
    a_connection_can_be_made_again,
    the_books_say_what_went,
    closing_leaves_no_thread,
    whatever_is_cancelled_when_the_rest_arrives,
)


def name_of(rule: Rule) -> str:
    name: str = getattr(rule, "__name__", "rule")
    return name


def run(rule: Rule, subject: Subject) -> None:
    """One rule on a loop of its own; fails rather than hangs."""

    async def bounded() -> None:
        async with asyncio.timeout(3 * PATIENCE_S):
            await rule(subject)

    try:
        asyncio.run(bounded())
    finally:
        subject.close()

"""Two daemons' ends to test with: a Service that keeps a record, a pair of them that is connected, pieces to send."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pdserve import kernels
from pdserve.chunk import KEY_BYTES
from pdserve.errors import PdserveError
from pdserve.transfer.transports.base import Connection, Local, Offer, Outcome, Piece, Service, Slot, Transport
from pdserve.transfer.transports.conformance.subject import Subject

#: longer than anything takes on a busy machine
PATIENCE_S = 60.0
#: what stands in memory that nobody may write into
_CANARY = 0xEE
_ARENA = 48 << 20


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
        """Waits for it to be so; looks again now and then, since not everything that may be asked for says that it changed."""
        ends = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < ends, "it did not come to be so"
            self.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
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


@contextlib.asynccontextmanager
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


async def raised(kind: type[BaseException], waiting: Awaitable[Any]) -> BaseException:
    """The error of that kind that it ends with."""
    try:
        result = await waiting
    except kind as e:
        return e
    except PdserveError as e:
        raise AssertionError(f"{kind.__name__} was due, not {e!r}") from e
    raise AssertionError(f"{kind.__name__} was due, but it returned {result!r}")

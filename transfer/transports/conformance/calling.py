"""Rules: small messages, their errors and their deadlines."""

from __future__ import annotations

import asyncio
import secrets

from pdserve.errors import ProtocolError
from pdserve.transfer.transports.base import Connection, DeadlinePassed, PeerRefused
from pdserve.transfer.transports.conformance.ends import PATIENCE_S, paired, pieces, raised, soon
from pdserve.transfer.transports.conformance.subject import Subject


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

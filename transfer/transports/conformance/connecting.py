"""Rules: how connections begin and how they end."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time

from pdserve.chunk import KEY_BYTES
from pdserve.transfer.transports.base import Connection, DeadlinePassed, Expected, PeerLost, PeerUnreachable
from pdserve.transfer.transports.conformance.ends import PATIENCE_S, Pair, end, paired, pieces, raised, soon
from pdserve.transfer.transports.conformance.subject import Subject


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

"""Rules: a slot or a push that ends early. Whatever still comes lands nowhere."""

from __future__ import annotations

import asyncio
import random
import secrets
from typing import Any

from pdserve.chunk import KEY_BYTES
from pdserve.transfer.transports.base import Connection, DeadlinePassed, Expected, Outcome, PeerLost, Piece, Slot
from pdserve.transfer.transports.conformance.ends import Pair, landed, paired, pieces, raised, same, soon
from pdserve.transfer.transports.conformance.subject import Subject


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
        (late,) = await pair.there.push(named[:1], soon(0.5))  # nobody will ever say that it landed
        (good,) = await pair.there.push(named[1:], soon())
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
        except (
            PeerLost,
            DeadlinePassed,
        ):  # a stream stuck in the middle of a segment was cut; or not even the offer was in time
            outcomes = []
        assert {o.state for o in outcomes} <= {"late", "lost", "cancelled"}
        pair.a.arena[:] = 1  # nobody reads it any more
        await pair.b.service.until(lambda: len(pair.b.service.lent) == len(sent))
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

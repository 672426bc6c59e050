"""Rules: what is pushed arrives whole, where it belongs, and nothing else does."""

from __future__ import annotations

import asyncio
import secrets

from pdserve.chunk import KEY_BYTES
from pdserve.errors import ProtocolError
from pdserve.transfer.transports.base import Connection, Expected, Outcome, PeerLost, Piece, Slot
from pdserve.transfer.transports.conformance.ends import landed, paired, pieces, raised, same, soon
from pdserve.transfer.transports.conformance.subject import Subject


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


async def the_books_say_what_went(subject: Subject) -> None:
    async with paired(subject) as pair:
        await pair.there.push(pieces(pair.a, [1 << 20, 5000]), soon())
        sent, received = pair.there.stats(), pair.back.stats()
        assert sent["sent_bytes"] == received["received_bytes"] == (1 << 20) + 5000
        assert received["open_tickets"] == 0
        assert {"drained_bytes", "streams", "credit_bytes"} <= set(sent)
        assert pair.there.peer == "b"
        assert pair.back.peer == "a"

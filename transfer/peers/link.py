"""One peer as this daemon deals with it: the connection to it, what it tells of its chunks, what is sent to it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING

from pdserve.errors import ProtocolError
from pdserve.transfer.peers import messages
from pdserve.transfer.peers.membership import Member
from pdserve.transfer.peers.messages import DISK, MEMORY
from pdserve.transfer.peers.push import MAX_WANTED, Outbox
from pdserve.transfer.resident import Chunk
from pdserve.transfer.transports.base import Connection, DeadlinePassed, Outcome, Piece, TransportError

if TYPE_CHECKING:
    from pdserve.transfer.peers.node import Node

#: a small message and its answer, the greeting and the dialling included
CALL_S = 1.0
#: between two looks at what the peer has
SYNC_EVERY_S = 0.2
#: a peer that has not been reached for so long is no longer believed to have what it had
FORGET_S = 10.0
#: what is sent together, and the time that it gets: some seconds, and what a slow link takes
BATCH_BYTES = 16 << 20
PUSH_S, SLOWEST = 5.0, 2e6
#: batches to one peer at once: while one is offered the other is sent
SENDERS = 2


class PeerUnavailable(TransportError):
    """It is left alone for a moment after a failure."""


class Link:
    """Tasks of one peer, from its joining to its leaving."""

    def __init__(self, node: Node, member: Member) -> None:
        self.node, self.member = node, member
        self.outbox = Outbox()
        self._later: deque[bytes] = deque(maxlen=MAX_WANTED)  # to be sent when there is room; not held meanwhile
        self._wake = asyncio.Event()
        self._dialling = asyncio.Lock()
        self._connection: Connection | None = None
        self._reached = 0.0
        self._tasks = [asyncio.create_task(self._sync(), name=f"peer {member.url} sync")]
        self._tasks += [asyncio.create_task(self._send(), name=f"peer {member.url} send") for _ in range(SENDERS)]

    # ---- asking ----

    async def call(self, request: messages.Request, seconds: float = 0.0) -> messages.Reply:
        """Its answer. Raises TransportError; who does not answer in time (CALL_S) is left alone for a while."""
        ticket, seconds = self._allow(), seconds or CALL_S
        try:
            async with asyncio.timeout(seconds + 0.5):  # the transport keeps the deadline; this one keeps the transport
                connection = await self._connected(time.monotonic() + seconds)
                data = await connection.call(messages.encode(request), time.monotonic() + seconds)
            reply = messages.decode_reply(data)
        except (TransportError, ProtocolError, TimeoutError) as e:
            await self._failed(ticket, f"{type(e).__name__}: {e}")
            raise e if isinstance(e, TransportError) else TransportError(str(e) or "no answer in time") from e
        except BaseException:
            self.member.failed(ticket, time.monotonic(), "cancelled")
            raise
        self._reached = time.monotonic()
        self.member.breaker.success(ticket)
        return reply

    def _allow(self) -> int:
        now = time.monotonic()
        ticket = self.member.breaker.allow(now)
        if ticket is None:
            wait = self.member.breaker.next_try(now)
            raise PeerUnavailable(
                f"{self.member.url}: left alone for {wait:.1f} s more after: {self.member.last_error}"
            )
        return ticket

    async def _failed(self, ticket: int, why: str) -> None:
        self.member.failed(ticket, time.monotonic(), why)
        self.node.metrics["peer_failures_total"].labels(self.member.name or self.member.url).inc()
        if self.member.is_news(
            why
        ):  # each reason once until it is well again: it may be tried every few seconds for days
            self.node.log.warning("peer %s (%s) is left alone: %s", self.member.name, self.member.url, why)
        await self._disconnect(why)

    async def _connected(self, deadline: float) -> Connection:
        async with self._dialling:
            if self._connection is not None and not self._connection.closed:
                return self._connection
            await self._disconnect("it was closed")
            connection = await self.node.dial(self.member.url, deadline)
            self._connection = connection
            greet = messages.Greet(messages.VERSION, self.node.name, self.node.url, self.node.epoch)
            greeting = messages.decode_reply(await connection.call(messages.encode(greet), deadline))
            if isinstance(greeting, messages.No):
                raise ProtocolError(greeting.reason)
            if not isinstance(greeting, messages.Greeting):
                raise ProtocolError(f"it greeted with a {type(greeting).__name__}")
            self.node.greeted(self, greeting)
            return connection

    async def _disconnect(self, why: str) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close(why[:200])

    # ---- what it has ----

    async def _sync(self) -> None:
        while not self.member.ourselves:
            more = False
            try:
                for place in (MEMORY, DISK) if self.member.disk else (MEMORY,):
                    more |= await self._look(place)
            except TransportError:
                if time.monotonic() - self._reached > FORGET_S:
                    self.node.forget(self.member.url)
            await asyncio.sleep(0 if more else SYNC_EVERY_S)

    async def _look(self, place: int) -> bool:
        """What has changed there; True: there is more."""
        directory, url, member = self.node.directories[place], self.member.url, self.member
        goodbyes = member.goodbyes
        reply = await self.call(directory.ask(url, place))
        if not isinstance(reply, messages.Changes | messages.Page) or member.goodbyes != goodbyes:
            return False  # an answer from before its goodbye must not bring it back
        member.draining, member.gone, member.chunk_bytes = reply.draining, False, reply.chunk_bytes
        if place == DISK:
            member.disk_told = float(reply.bytes_per_s)
        return directory.take(url, reply)

    # ---- sending ----

    def send(self, chunk: Chunk) -> bool:
        """Queues a committed chunk; False when it cannot be sent now."""
        if chunk.key in self.outbox.keys:
            return True
        if not self.member.takes(time.monotonic()):
            self.node.count(self.member, "out", "dropped")
            return False
        if self._later or not self.node.giving.may_queue(chunk.size):
            self._later.append(chunk.key)
            return True
        self._hold(chunk)
        return True

    def _hold(self, chunk: Chunk) -> None:
        self.node.store.hold(chunk)
        self.outbox.add(chunk)
        self._wake.set()

    def refill(self) -> None:
        """What had no room before has it now, if it has not been evicted meanwhile."""
        while self._later:
            chunk = self.node.store.peek(self._later[0])
            there = chunk is not None and chunk.committed and chunk.key not in self.outbox.keys
            if there and chunk is not None:
                if not self.node.giving.may_queue(chunk.size):
                    return
                self._hold(chunk)
            self._later.popleft()

    async def _send(self) -> None:
        while True:
            await self._wake.wait()
            batch = self.outbox.take(BATCH_BYTES)
            if not batch:
                self._wake.clear()
                continue
            try:
                outcomes = await self._push(batch)
                self._count(batch, outcomes)
            except TransportError as e:
                self.node.count(self.member, "out", "failed", len(batch))
                self.node.log.info("%d chunks for peer %s were not sent: %s", len(batch), self.member.name, e)
                self._drop_waiting()
            finally:
                for chunk in batch:
                    self._let_go(chunk)
                self.node.giving.refill()
                self.node.after()

    async def _push(self, batch: list[Chunk]) -> list[list[Outcome]]:
        """One list of outcomes for each chunk."""
        ticket = self._allow()
        seconds = PUSH_S + sum(c.payload_bytes for c in batch) / SLOWEST
        pieces = [piece for chunk in batch for piece in _pieces(chunk)]
        try:
            connection = await self._connected(time.monotonic() + CALL_S)
            outcomes = await connection.push(pieces, time.monotonic() + seconds)
            if outcomes and all(o.state == "late" for o in outcomes):
                raise DeadlinePassed(f"nothing of {len(pieces)} pieces arrived within {seconds:.1f} s")
        except (TransportError, ProtocolError) as e:
            await self._failed(ticket, f"{type(e).__name__}: {e}")
            raise e if isinstance(e, TransportError) else TransportError(str(e)) from e
        except BaseException:
            self.member.failed(ticket, time.monotonic(), "cancelled")
            raise
        self._reached = time.monotonic()
        self.member.breaker.success(ticket)
        found, start = [], 0
        for chunk in batch:
            found.append(outcomes[start : start + len(chunk.digests)])
            start += len(chunk.digests)
        return found

    def _count(self, batch: list[Chunk], outcomes: list[list[Outcome]]) -> None:
        for chunk, pieces in zip(batch, outcomes, strict=True):
            bad = next((o for o in pieces if not o.ok), None)
            self.node.count(self.member, "out", bad.state if bad else "arrived")
            if bad is None:
                self.node.metrics["peer_bytes_total"].labels(self.member.name, "out").inc(chunk.payload_bytes)
            elif bad.state != "refused":
                self.node.log.info("a chunk for peer %s: %s %s", self.member.name, bad.state, bad.reason)

    def _let_go(self, chunk: Chunk) -> None:
        self.outbox.done(chunk)
        self.node.store.unhold(chunk)

    def _drop_waiting(self) -> None:
        self._later.clear()
        dropped = self.outbox.clear()
        for chunk in dropped:
            self.node.store.unhold(chunk)
        if dropped:
            self.node.count(self.member, "out", "dropped", len(dropped))

    # ---- the end ----

    async def close(self, bye: bool) -> None:
        """Ends its tasks and the connection; returns when nothing of it reads the arena any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._drop_waiting()
        if bye and self._connection is not None and not self._connection.closed:
            with contextlib.suppress(TransportError):
                await self._connection.call(messages.encode(messages.Bye(self.node.url)), time.monotonic() + 0.5)
        await self._disconnect("the daemon ends" if bye else "it is no longer listed")


def _pieces(chunk: Chunk) -> list[Piece]:
    record = chunk.record()
    meta = messages.encode(
        messages.Meta(record.format, record.parent, record.tokens, record.shard_bytes, len(record.digests), record.tag)
    )
    return [
        Piece(chunk.key, i, chunk.offset + i * chunk.stride, chunk.shard_bytes, digest, meta=meta)
        for i, digest in enumerate(record.digests)
    ]

"""ucx://host:port: control on TCP as everywhere, bytes by UCX tag messages. Serves ucx-py (`ucp`) and its successor ucxx alike.

Headers of up to _BATCH segments travel together under one tag, each segment's bytes under a tag of their own, received straight
into the slot. The two ends tell each other their worker address and a random base for tags over the authenticated control way, so
nobody else can name a tag that is being waited for.

A receive that UCX has begun cannot be called back (neither library offers it), so a slot that is cancelled in the middle of its
bytes ends when they have come, or, after _PATIENCE_S, by ending the connection, which does call it back.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
import threading
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Annotated, Any

import msgspec
import numpy as np

from pdserve.chunk import KEY_BYTES
from pdserve.errors import ProtocolError
from pdserve.kernels import receive
from pdserve.transfer.transports.base import Connection, Expected, Local, Outcome, Service
from pdserve.transfer.transports.ledger import Ledger
from pdserve.transfer.transports.net import NetTransport, address_of, plane_ready
from pdserve.transfer.transports.outbox import Segment
from pdserve.transfer.transports.plane import Limits, Plane
from pdserve.transfer.transports.security import Security
from pdserve.transfer.transports.session import Session
from pdserve.transfer.transports.ucx_library import Library, device_of, imported, own_address

#: payload tag, ticket, key, shard, digest of the piece, bytes of the piece, offset in it, bytes that follow
_HEADER = struct.Struct(f"<QQ{KEY_BYTES}sHQQQQ")
#: small segments whose headers are sent as one, and about how many bytes of them
_BATCH = 16
_BATCH_BYTES = 1 << 20
#: batches under way at a time, each direction; four left a gap behind each header at 1 MiB a segment
_DEPTH = 8
#: how many segments, and their headers; always of this size, since ucx-py takes a shorter message than expected for an error
_COUNT = struct.Struct("<Q")
_HEADERS_BYTES = _COUNT.size + _BATCH * _HEADER.size
_PATIENCE_S = 2.0


class _Hello(msgspec.Struct, array_like=True, frozen=True):
    address: Annotated[bytes, msgspec.Meta(max_length=65536)]
    #: of what comes to the teller: headers under it, bytes under those after it
    tag: Annotated[int, msgspec.Meta(ge=1, le=2**62)]


class UcxPlane:
    """Implements session.Plane. Everything below `# on the library's loop` runs there."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._session: Session | None = None
        self.ready = asyncio.Event()
        self._base = secrets.randbits(61) + 1
        self._their_base = 0
        self._endpoint: Any = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._more: asyncio.Event | None = None
        self._closing = False
        #: tests hold payloads back with it, after their header has gone
        self.held = threading.Event()
        self._sent = self._received = self._drained = 0

    def start(self, session: Session) -> None:
        self._session = session
        session.tell_plane(msgspec.msgpack.encode(_Hello(self._library.address, self._base)))

    def message(self, payload: bytes) -> None:
        try:
            hello = msgspec.msgpack.decode(payload, type=_Hello)
        except msgspec.DecodeError as e:
            raise ProtocolError(f"ucx: {e}") from e
        if self._their_base:
            raise ProtocolError("ucx: a second greeting")
        self._their_base = hello.tag
        self._library.run(self._join(hello.address))

    def lent(self, ticket: int, expected: Expected) -> None:
        """The ledger is asked for every segment."""

    def unwanted(self, tickets: list[int]) -> None:
        assert self._session is not None
        if self._session.ledger.lingering(tickets):
            self._session.loop.call_later(_PATIENCE_S, self._call_back, tickets)

    def _call_back(self, tickets: list[int]) -> None:
        assert self._session is not None
        if self._session.ledger.lingering(tickets):
            self._session.lost(
                "bytes for a cancelled slot did not come, and UCX can only call them back by ending the connection"
            )

    def interrupt(self) -> None:
        assert self._session is not None
        self._session.lost("a push is over, and UCX can let go of its bytes only by ending the connection")

    async def close(self) -> None:
        self._closing = True
        await asyncio.wrap_future(self._library.run(self._leave()))

    def stats(self) -> dict[str, int | float | str]:
        return {
            "sent_bytes": self._sent,
            "received_bytes": self._received,
            "drained_bytes": self._drained,
            "streams": 1,
            "library": self._library.name,
        }

    # ---- on the library's loop ----

    async def _join(self, address: bytes) -> None:
        session = self._session
        assert session is not None
        try:
            self._endpoint = await self._library.endpoint(address)
        except Exception as e:  # noqa: BLE001 - the library has its own tree of errors
            session.post(session.lost, f"ucx: no endpoint: {e}")
            return
        if self._closing:
            return
        self._more = asyncio.Event()
        more = self._more
        session.outbox.on_ready = partial(self._nudge, more)
        self._spawn(self._send_all(session, more))
        self._spawn(self._receive_all(session))
        session.post(self.ready.set)

    def _nudge(self, more: asyncio.Event) -> None:
        self._library.loop.call_soon_threadsafe(more.set)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._library.loop.create_task(self._guarded(coroutine))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, coroutine: Coroutine[Any, Any, None]) -> None:
        session = self._session
        assert session is not None
        try:
            await coroutine
        except asyncio.CancelledError:
            pass
        except Exception as e:  # noqa: BLE001 - the library has its own tree of errors; a dead task would leave slots lent
            session.post(session.lost, f"ucx: {e}" if str(e) else f"ucx: {e!r}")

    async def _leave(self) -> None:
        """Ends the endpoint, which calls every request back, and waits for the tasks that had one."""
        if self._endpoint is not None:
            self._endpoint.abort()
        if self._more is not None:
            self._more.set()
        while self._tasks:
            # Nothing comes in any more that would wake UCX, so it is made to look.
            self._library.progress()
            await asyncio.wait(self._tasks, timeout=0.05)
        self._endpoint = None

    async def _send_all(self, session: Session, more: asyncio.Event) -> None:
        outbox, free = session.outbox, asyncio.Semaphore(_DEPTH)
        tag = self._their_base
        while not outbox.closed:
            await free.acquire()
            more.clear()
            segments = outbox.take(_BATCH_BYTES, _BATCH, 0.0)
            if segments:
                tags = [(tag + 1 + i) % 2**64 for i in range(len(segments))]
                tag = tags[-1]
                self._spawn(self._send(session, segments, tags, free))
            else:
                free.release()
                if not outbox.closed:  # it says so before it tells us, so this cannot be missed
                    await more.wait()

    async def _send(
        self, session: Session, segments: Sequence[Segment], tags: Sequence[int], free: asyncio.Semaphore
    ) -> None:
        try:
            await self._library.send(self._endpoint, _headers(segments, tags), self._their_base)
            while self.held.is_set() and not self._closing:  # noqa: ASYNC110 - only tests set it
                await asyncio.sleep(0.02)
            # All of them are waited for, also when one fails: until then UCX reads the arena.
            payloads = (self._payload(session, s, tag) for s, tag in zip(segments, tags, strict=True))
            for problem in await asyncio.gather(*payloads, return_exceptions=True):
                if problem is not None:
                    raise problem
        finally:
            session.outbox.gone(segments)
            free.release()

    async def _payload(self, session: Session, segment: Segment, tag: int) -> None:
        start = segment.piece.offset + segment.start
        await self._library.send(self._endpoint, session.local.arena[start : start + segment.length], tag)
        self._sent += segment.length

    async def _receive_all(self, session: Session) -> None:
        free = asyncio.Semaphore(_DEPTH * _BATCH)
        while True:
            headers = np.empty(_HEADERS_BYTES, np.uint8)
            await self._library.receive(self._endpoint, headers, self._base)
            (count,) = _COUNT.unpack_from(headers)
            if not 0 < count <= _BATCH:
                raise ProtocolError(f"headers of {count} segments")
            for i in range(count):
                await free.acquire()
                self._spawn(self._receive(session, _HEADER.unpack_from(headers, _COUNT.size + i * _HEADER.size), free))

    async def _receive(self, session: Session, header: tuple[Any, ...], free: asyncio.Semaphore) -> None:
        tag, ticket, key, shard, digest, total, offset, length = header
        try:
            if not 0 < length <= total or length > 2**34:
                raise ProtocolError(f"a segment of {length} bytes for a piece of {total}")
            view = session.ledger.enter(ticket, key, shard, total, offset, length, digest)
            if view is None:
                await self._drain(length, tag)
            else:
                await self._fill(session, ticket, view, tag, session.ledger.word_of(offset, length, total))
            session.consumed(length)
        finally:
            free.release()

    async def _fill(self, session: Session, ticket: int, view: memoryview, tag: int, word: int | None) -> None:
        failed: Outcome | None = Outcome("lost", "the connection ended in the middle of the bytes")
        length, ledger, into = len(view), session.ledger, np.frombuffer(view, np.uint8)
        try:
            await self._library.receive(self._endpoint, into, tag)
            failed = None
            self._received += length
        finally:
            if failed is not None or not ledger.verify:
                ledger.leave(ticket, 0 if failed else length, failed)
            else:  # elsewhere than on UCX's loop, since it reads the bytes for their digest
                await asyncio.shield(asyncio.to_thread(_leave, ledger, ticket, into, word))

    async def _drain(self, length: int, tag: int) -> None:
        await self._library.receive(self._endpoint, np.empty(length, np.uint8), tag)
        self._drained += length


def _headers(segments: Sequence[Segment], tags: Sequence[int]) -> np.ndarray:
    packed = np.zeros(_HEADERS_BYTES, np.uint8)
    _COUNT.pack_into(packed, 0, len(segments))
    for i, (s, tag) in enumerate(zip(segments, tags, strict=True)):
        at, piece = _COUNT.size + i * _HEADER.size, s.piece
        fields = (tag, s.ticket, piece.key, piece.shard, piece.digest, piece.length, s.start, s.length)
        _HEADER.pack_into(packed, at, *fields)
    return packed


def _leave(ledger: Ledger, ticket: int, there: np.ndarray, word: int | None) -> None:
    part = None if word is None or not receive.available() else receive.part(there, word)
    ledger.leave(ticket, there.nbytes, None, part)


class UcxTransport(NetTransport):
    """Implements base.Transport."""

    scheme = "ucx"

    def __init__(self, local: Local, security: Security, limits: Limits, tls: str = "tcp") -> None:
        super().__init__(local, security, limits)
        self._tls = tls
        imported()

    async def listen(self, url: str, service: Service) -> str:
        await self._start(address_of(url, self.scheme)[0])
        return await super().listen(url, service)

    async def connect(self, url: str, service: Service, deadline: float) -> Connection:
        await self._start(own_address(address_of(url, self.scheme)[0]))
        return await super().connect(url, service, deadline)

    async def _start(self, own: str) -> None:
        """UCX uses the network device of this address of ours: left to itself it may offer one that the peer cannot reach."""
        await asyncio.to_thread(Library.get, self._tls, device_of(own))

    def make_plane(self, dialled: bool) -> Plane:
        return UcxPlane(Library.get(self._tls, ""))

    async def make_ready(self, session: Session, host: str, port: int, deadline: float) -> None:
        assert isinstance(session.plane, UcxPlane)
        await plane_ready(session, session.plane.ready, f"{host}:{port}")

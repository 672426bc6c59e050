"""nixl://host:port: control on TCP as everywhere, bytes by NIXL, whose wheel is the one that brings RDMA code along.

The sender writes into the receiver's arena by itself (WRITE: over tcp it is two to three times as fast as READ), so the receiver
tells it where each lent slot lies, and a notification of NIXL's says what has come. That makes cancelling a matter of two: the
receiver says stop, the sender says that it has left, and only then is the slot over. A sender that does not answer costs the
connection: its agent goes, and with the agent's registration the right to write.

One agent and one thread for each connection, and all calls on that thread; NIXL's own progress thread is off, since it keeps a
core busy at either end. The thread looks often while something is under way and sleeps otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import secrets
import struct
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pdserve.chunk import KEY_BYTES
from pdserve.errors import ConfigError, ProtocolError
from pdserve.transfer.transports.base import MAX_TICKETS, Expected, Local, Outcome
from pdserve.transfer.transports.net import NetTransport, plane_ready
from pdserve.transfer.transports.outbox import Segment
from pdserve.transfer.transports.plane import Limits, Plane
from pdserve.transfer.transports.security import Security
from pdserve.transfer.transports.session import Session

#: what a notification says: ticket, key, shard, bytes of the piece, bytes written
_WRITTEN = struct.Struct(f"<Q{KEY_BYTES}sHQQ")
#: small segments that one transfer writes, and about how many bytes of them
_BATCH = 64
_BATCH_BYTES = 1 << 20
#: transfers under way at a time
_DEPTH = 4
_PATIENCE_S = 2.0
_LOOK_S = 0.0001
_IDLE_S = 0.2

Tickets = Annotated[list[int], msgspec.Meta(max_length=MAX_TICKETS)]


class _Hello(msgspec.Struct, array_like=True, frozen=True, tag=1):
    metadata: Annotated[bytes, msgspec.Meta(max_length=1 << 20)]
    #: where the teller's arena begins, in its own memory
    address: int


class _Lent(msgspec.Struct, array_like=True, frozen=True, tag=2):
    ticket: int
    offset: int
    length: int


class _Stop(msgspec.Struct, array_like=True, frozen=True, tag=3):
    tickets: Tickets


class _Left(msgspec.Struct, array_like=True, frozen=True, tag=4):
    tickets: Tickets


_Message = _Hello | _Lent | _Stop | _Left
_decoder = msgspec.msgpack.Decoder(_Message)


class _Coming:
    """What is being written into one of our slots."""

    __slots__ = ("came", "key", "length", "shard")

    def __init__(self, key: bytes, shard: int, length: int) -> None:
        self.key, self.shard, self.length, self.came = key, shard, length, 0


def _library() -> Any:
    for name in ("nixl_cu12", "nixl_cu13"):
        try:
            return importlib.import_module(f"{name}._api")
        except ImportError:
            continue
    raise ConfigError(
        "",
        "nixl:// needs nixl-cu12 or nixl-cu13, which is not installed",
        "pip install --no-deps nixl-cu12 (its dependency on torch is not needed here), or use tcp://.",
    )


def _set_environment(tls: str) -> None:
    """What the UCX inside NIXL reads when it is loaded; who sets it himself means it."""
    if tls:
        os.environ.setdefault("UCX_TLS", tls)
    if not any(Path("/sys/class/infiniband").glob("*")):
        # Without a device its InfiniBand part is of no use, and the wheel's (1.5.1) crashes the process when that ends.
        os.environ.setdefault("UCX_MODULES", "^ib")


class NixlPlane:
    """Implements session.Plane. What is marked `# on the thread` runs nowhere else; the loop hands it commands."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._session: Session | None = None
        self.ready = asyncio.Event()
        self._gone = asyncio.Event()
        self._commands: deque[_Message] = deque()
        self._wake = threading.Event()
        self._closing = False
        self.held = threading.Event()  # tests hold writes back with it
        # the thread's own
        self._agent: Any = None
        self._peer = ""
        self._their_address = 0
        self._places: dict[int, _Lent] = {}
        self._flying: list[tuple[list[Segment], Any]] = []
        self._waiting: list[Segment] = []
        self._writing: Counter[int] = Counter()
        self._stopped: set[int] = set()
        # shared: lent on the loop, filled on the thread
        self._lock = threading.Lock()
        self._coming: dict[int, _Coming] = {}
        self._sent = self._received = 0

    # ---- session.Plane, on the loop ----

    def start(self, session: Session) -> None:
        self._session = session
        session.outbox.on_ready = self._wake.set
        threading.Thread(target=self._run, args=(session,), name=f"nixl-{session.peer}", daemon=True).start()

    def message(self, payload: bytes) -> None:
        try:
            self._commands.append(_decoder.decode(payload))
        except msgspec.DecodeError as e:
            raise ProtocolError(f"nixl: {e}") from e
        self._wake.set()

    def lent(self, ticket: int, expected: Expected) -> None:
        session, slot = self._session, expected.slot
        assert session is not None
        # The peer may write from now on, so the slot counts as entered until it is complete or the peer has left.
        view = session.ledger.enter(ticket, expected.key, expected.shard, slot.length, 0, slot.length, expected.digest)
        assert view is not None
        with self._lock:
            self._coming[ticket] = _Coming(expected.key, expected.shard, slot.length)
        session.tell_plane(msgspec.msgpack.encode(_Lent(ticket, slot.offset, slot.length)))
        self._wake.set()

    def unwanted(self, tickets: list[int]) -> None:
        session = self._session
        assert session is not None
        with self._lock:
            tickets = [ticket for ticket in tickets if ticket in self._coming]
        if tickets and not session.closed:
            session.tell_plane(msgspec.msgpack.encode(_Stop(tickets)))
            session.loop.call_later(_PATIENCE_S, self._insist, tickets)

    def _insist(self, tickets: list[int]) -> None:
        session = self._session
        assert session is not None
        if session.ledger.lingering(tickets):
            session.lost("it was told to stop writing and did not say that it has")

    def interrupt(self) -> None:
        assert self._session is not None
        self._session.lost("a push is over, and NIXL did not let go of its bytes")

    async def close(self) -> None:
        self._closing = True
        self._wake.set()
        await self._gone.wait()

    def stats(self) -> dict[str, int | float | str]:
        return {"sent_bytes": self._sent, "received_bytes": self._received, "drained_bytes": 0, "streams": 1}

    # ---- on the thread ----

    def _run(self, session: Session) -> None:
        try:
            self._begin(session)
            while not self._closing:
                busy = self._obey(session)
                self._send(session)
                busy |= self._finish(session)
                busy |= self._notice(session)
                if not busy:
                    self._rest(session)
        except Exception as e:  # noqa: BLE001 - the library has its own errors; a dead thread would leave slots lent
            session.post(session.lost, f"nixl: {e}" if str(e) else f"nixl: {e!r}")
            while not self._closing:
                self._wake.wait(_IDLE_S)
        finally:
            self._end(session)
            session.post(self._gone.set)

    def _begin(self, session: Session) -> None:
        config = self._library.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._agent = self._library.nixl_agent(f"{session.local.name}-{secrets.token_hex(8)}", config)
        arena = session.local.arena
        self._memory = self._agent.register_memory([(arena.ctypes.data, arena.size, 0, "")], "DRAM")
        hello = _Hello(self._agent.get_agent_metadata(), arena.ctypes.data)
        session.post(session.tell_plane, msgspec.msgpack.encode(hello))

    def _obey(self, session: Session) -> bool:
        busy = bool(self._commands)
        while self._commands:
            message = self._commands.popleft()
            match message:
                case _Hello():
                    if self._peer:
                        raise ProtocolError("a second greeting")
                    name = self._agent.add_remote_agent(message.metadata)
                    self._peer = name.decode() if isinstance(name, bytes) else name
                    self._their_address = message.address
                    session.post(self.ready.set)
                case _Lent():
                    if len(self._places) >= MAX_TICKETS:
                        raise ProtocolError(f"more than {MAX_TICKETS} slots are lent to us")
                    self._places[message.ticket] = message
                case _Stop():
                    session.outbox.end(message.tickets)
                    self._stopped.update(message.tickets)
                case _Left():
                    self._leave(session, message.tickets)
        if self._stopped:
            busy |= self._answer_stops(session)
        return busy

    def _answer_stops(self, session: Session) -> bool:
        """Says for which stopped tickets nothing is being written any more."""
        left = [ticket for ticket in self._stopped if not self._writing[ticket]]
        if left:
            self._stopped.difference_update(left)
            for ticket in left:
                self._places.pop(ticket, None)
            session.post(session.tell_plane, msgspec.msgpack.encode(_Left(left)))
        return bool(left)

    def _leave(self, session: Session, tickets: list[int]) -> None:
        for ticket in tickets:
            with self._lock:
                coming = self._coming.pop(ticket, None)
            if coming is not None:
                session.ledger.leave(ticket, 0, Outcome("cancelled", "the sender has left it"))

    def _send(self, session: Session) -> None:
        while self._peer and len(self._flying) < _DEPTH and (segments := self._next(session)):
            self._start(session, segments)

    def _next(self, session: Session) -> list[Segment]:
        """What is written next, as one transfer: few calls for small pieces."""
        outbox = session.outbox
        taken = self._waiting or outbox.take(_BATCH_BYTES, _BATCH, 0.0)
        self._waiting = []
        if taken:
            self._obey(session)  # where their slots lie was told before they were put in, but perhaps after we looked
        for segment in taken:
            if segment.ticket in self._stopped or not outbox.wanted(segment):
                outbox.add_credit(segment.length)
                outbox.gone([segment])
            else:
                self._waiting.append(segment)
        if self.held.is_set():
            return []
        segments, self._waiting = self._waiting, []
        return segments

    def _start(self, session: Session, segments: list[Segment]) -> None:
        # In nobody's hands but the transfer's from here on; _end() gives back what never got that far.
        sources, targets, said = [], [], b""
        base = session.local.arena.ctypes.data
        self._waiting = segments
        for s in segments:
            piece, place = s.piece, self._places.get(s.ticket)
            if place is None or place.length != piece.length:
                raise ProtocolError(f"ticket {s.ticket} is not for a piece of {piece.length} bytes")
            sources.append((base + piece.offset + s.start, s.length, 0))
            targets.append((self._their_address + place.offset + s.start, s.length, 0))
            said += _WRITTEN.pack(s.ticket, piece.key, piece.shard, piece.length, s.length)
        agent = self._agent
        ours, theirs = agent.get_xfer_descs(sources, "DRAM"), agent.get_xfer_descs(targets, "DRAM")
        handle = agent.initialize_xfer("WRITE", ours, theirs, self._peer, said)
        self._waiting = []
        self._flying.append((segments, handle))
        self._writing.update(s.ticket for s in segments)
        if agent.transfer(handle) == "ERR":
            raise ConnectionError("a write could not be started")

    def _finish(self, session: Session) -> bool:
        still: list[tuple[list[Segment], Any]] = []
        for segments, handle in self._flying:
            state = self._agent.check_xfer_state(handle)
            if state == "PROC":
                still.append((segments, handle))
                continue
            if state != "DONE":
                raise ConnectionError(f"a write ended with {state}")
            self._agent.release_xfer_handle(handle)
            for s in segments:
                self._sent += s.length
                self._writing[s.ticket] -= 1
                if not self._writing[s.ticket]:
                    del self._writing[s.ticket]
            session.outbox.gone(segments)
        busy = len(still) < len(self._flying)
        self._flying = still
        return busy

    def _notice(self, session: Session) -> bool:
        """What the peer says to have written."""
        found = self._agent.get_new_notifs()
        for texts in found.values():
            for text in texts:
                self._written(session, text)
        return bool(found)

    def _written(self, session: Session, text: bytes) -> None:
        if not text or len(text) % _WRITTEN.size or len(text) > _BATCH * _WRITTEN.size:
            raise ProtocolError(f"a notification of {len(text)} bytes")
        for fields in _WRITTEN.iter_unpack(text):
            self._part_written(session, *fields)

    def _part_written(self, session: Session, ticket: int, key: bytes, shard: int, total: int, length: int) -> None:
        session.consumed(length)
        with self._lock:
            coming = self._coming.get(ticket)
            if coming is None:
                return
            if (key, shard, total) != (coming.key, coming.shard, coming.length):
                raise ProtocolError(f"ticket {ticket} is for another piece than the one that came")
            coming.came += length
            if coming.came < coming.length:
                return
            del self._coming[ticket]
        self._received += total
        session.ledger.leave(ticket, total)

    def _rest(self, session: Session) -> None:
        """Often while something is under way: over tcp, NIXL moves bytes only while it is called."""
        with self._lock:
            expecting = bool(self._coming)
        if expecting or self._flying or self._waiting:
            time.sleep(_LOOK_S)
        else:
            self._wake.wait(_IDLE_S)
            self._wake.clear()

    def _end(self, session: Session) -> None:
        """Takes the peer's right to write away, and only then gives the slots back."""
        for _, handle in self._flying:
            with contextlib.suppress(Exception):
                self._agent.release_xfer_handle(handle)  # aborts it
        if self._agent is not None:
            for step in (lambda: self._agent.remove_remote_agent(self._peer), self._deregister):
                with contextlib.suppress(Exception):  # gone already is as good
                    step()
            self._agent = None
        session.outbox.gone([segment for segments, _ in self._flying for segment in segments] + self._waiting)
        self._flying, self._waiting = [], []
        with self._lock:
            tickets = list(self._coming)
        for ticket in tickets:
            with self._lock:
                del self._coming[ticket]
            session.ledger.leave(ticket, 0, Outcome("lost", "the connection ended in the middle of the bytes"))

    def _deregister(self) -> None:
        self._agent.deregister_memory(self._memory)


class NixlTransport(NetTransport):
    """Implements base.Transport."""

    scheme = "nixl"

    def __init__(self, local: Local, security: Security, limits: Limits, tls: str = "") -> None:
        super().__init__(local, security, limits)
        _set_environment(tls)
        self._library = _library()

    def make_plane(self, dialled: bool) -> Plane:
        return NixlPlane(self._library)

    async def make_ready(self, session: Session, host: str, port: int, deadline: float) -> None:
        assert isinstance(session.plane, NixlPlane)
        await plane_ready(session, session.plane.ready, f"{host}:{port}")

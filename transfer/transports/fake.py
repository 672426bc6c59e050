"""A transport inside one process: what the conformance suite means, without a network, and with faults on demand.

    net = FakeNetwork()
    a, b = FakeTransport(net, Local("a", arena_a)), FakeTransport(net, Local("b", arena_b))
    await b.listen("fake://b", service_b)
    connection = await a.connect("fake://b", service_a, deadline)
    net.faults("a", "b").stalled = True        # bytes from a to b stop moving; small messages still do

All ends of a network live on one loop. Bytes move on a thread per direction, by copying, through the same ledger and outbox as
those of the real transports.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from pdserve.errors import ProtocolError, StartError
from pdserve.transfer.transports.base import (
    Connection,
    DeadlinePassed,
    Expected,
    Local,
    Outcome,
    PeerRefused,
    PeerUnreachable,
    Service,
)
from pdserve.transfer.transports.outbox import Segment
from pdserve.transfer.transports.plane import Limits
from pdserve.transfer.transports.session import Session

_TICK_S = 0.02


@dataclass
class Faults:
    """What happens to what one end sends to the other. Set from the loop; the copying thread looks at every step."""

    #: bytes stop moving (small messages still do)
    stalled: bool = False
    #: nothing moves at all, and nobody notices: a cable pulled out, a wedged process
    silent: bool = False
    #: after so many bytes of one segment, the connection breaks
    cut_after: int | None = None
    #: of the segments that wait, the last is sent first
    reorder: bool = False
    #: so many of the next segments get one byte changed
    corrupt_next: int = 0
    #: seconds that each segment takes
    delay_s: float = 0.0
    #: set while a segment is half copied and stalled: what it is into may not be given to anybody else
    half_way: threading.Event = field(default_factory=threading.Event)


class FakeNetwork:
    """Who listens where, and what goes wrong between whom."""

    def __init__(self) -> None:
        self._listeners: dict[str, tuple[FakeTransport, Service]] = {}
        self._faults: dict[tuple[str, str], Faults] = {}
        #: names that accept and then never answer
        self.wedged: set[str] = set()

    def faults(self, sender: str, receiver: str) -> Faults:
        """By the ends' own names (Local.name)."""
        return self._faults.setdefault((sender, receiver), Faults())

    def add(self, host: str, transport: FakeTransport, service: Service) -> None:
        if host in self._listeners:
            raise StartError(f"fake://{host} is taken already")
        self._listeners[host] = (transport, service)

    def remove(self, transport: FakeTransport) -> None:
        self._listeners = {host: found for host, found in self._listeners.items() if found[0] is not transport}

    def find(self, host: str) -> tuple[FakeTransport, Service]:
        found = self._listeners.get(host)
        if found is None:
            raise PeerUnreachable(f"nobody listens at fake://{host}")
        return found

    def cut(self, one: str, other: str) -> None:
        """Breaks every connection between the two."""
        for transport, _ in list(self._listeners.values()):
            for session in list(transport.sessions):
                if {transport.local.name, session.peer} == {one, other}:
                    session.lost("the connection was cut")


class _Channel:
    """Small messages, delivered in order on the next turn of the loop."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._loop = asyncio.get_running_loop()
        self.other: Session | None = None

    def send(self, data: bytes) -> None:
        if not self._faults.silent:
            self._loop.call_soon(self._deliver, data)

    def _deliver(self, data: bytes) -> None:
        if self.other is not None and not self.other.closed:
            self.other.received(data)

    def backlog(self) -> int:
        return 0

    def close(self) -> None:
        if self.other is not None and not self._faults.silent:
            self._loop.call_soon(self.other.lost, "the peer's end is gone")


class _Plane:
    """One thread that copies what this end sends into the other end's arena."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._session: Session | None = None
        self.other: Session | None = None
        self._gone = asyncio.Event()
        self._free = threading.Event()
        self.sent = self.received = self.drained = 0
        self.into: _Plane | None = None
        self._inside = 0

    def start(self, session: Session) -> None:
        self._session = session
        threading.Thread(target=self._run, args=(session,), name=f"fake-{session.peer}", daemon=True).start()

    def message(self, payload: bytes) -> None:
        raise ProtocolError("the fake plane has nothing to say")

    def lent(self, ticket: int, expected: Expected) -> None:
        """The sender asks the ledger for every segment."""

    def unwanted(self, tickets: list[int]) -> None:
        """The sender asks the ledger for every segment."""

    def interrupt(self) -> None:
        self._free.set()

    async def close(self) -> None:
        await self._gone.wait()
        if self.into is not None:
            await self.into._gone.wait()  # it is the other end's thread that writes into our arena

    def stats(self) -> dict[str, int | float | str]:
        return {
            "sent_bytes": self.sent,
            "received_bytes": self.received,
            "drained_bytes": self.drained,
            "streams": 1,
        }

    # ---- the thread ----

    def _run(self, session: Session) -> None:
        try:
            while not session.outbox.closed and not self._other_closed():
                segments = session.outbox.take(1 << 30, 64 if self._faults.reorder else 1, _TICK_S)
                for segment in reversed(segments) if self._faults.reorder else segments:
                    try:
                        self._carry(session, segment)
                    finally:
                        session.outbox.gone([segment])
        finally:
            session.post(self._gone.set)

    def _other_closed(self) -> bool:
        return self.other is None or self.other.closed

    def _carry(self, session: Session, segment: Segment) -> None:
        other, into = self.other, self.into
        assert other is not None
        assert into is not None
        piece = segment.piece
        if self._faults.delay_s:
            time.sleep(self._faults.delay_s)
        try:
            view = other.ledger.enter(
                segment.ticket, piece.key, piece.shard, piece.length, segment.start, segment.length, piece.digest
            )
        except ProtocolError as e:
            other.post(other.lost, f"sent what it must not: {e}")
            return
        if view is None:
            into.drained += segment.length
            other.consumed(segment.length)
            return
        failed = self._copy(session, segment, view)
        other.ledger.leave(segment.ticket, 0 if failed else segment.length, failed)
        self.sent += segment.length
        into.received += segment.length
        other.consumed(segment.length)

    def _copy(self, session: Session, segment: Segment, view: memoryview) -> Outcome | None:
        """In two halves: between them is where everything goes wrong."""
        start = segment.piece.offset + segment.start
        source = memoryview(session.local.arena)[start : start + segment.length]
        half = segment.length // 2
        view[:half] = source[:half]
        cut = self._faults.cut_after
        if cut is not None:
            self._faults.cut_after = None
            session.post(session.lost, "the connection was cut")
            return Outcome("lost", "the connection was cut")
        while self._faults.stalled or self._faults.silent:
            self._faults.half_way.set()
            assert self.other is not None
            if session.closed or self._other_closed() or self._free.is_set():
                return Outcome("lost", "the connection was cut")
            if not self.other.ledger.wanted(segment.ticket):
                return Outcome("lost", "not wanted any more")  # the ledger keeps the reason it was ended for
            if not session.outbox.wanted(segment):
                return Outcome("lost", "the sender gave up")
            time.sleep(_TICK_S)
        view[half:] = source[half:]
        if self._faults.corrupt_next:
            self._faults.corrupt_next -= 1
            view[half] ^= 0xFF
        return None


class FakeTransport:
    """Implements base.Transport for fake://."""

    scheme = "fake"

    def __init__(self, network: FakeNetwork, local: Local, limits: Limits | None = None) -> None:
        self.network, self.local, self.limits = network, local, limits or Limits()
        self.sessions: set[Session] = set()

    async def listen(self, url: str, service: Service) -> str:
        host = urlsplit(url).hostname or ""
        self.network.add(host, self, service)
        return f"fake://{host}"

    async def connect(self, url: str, service: Service, deadline: float) -> Connection:
        host = urlsplit(url).hostname or ""
        there, their_service = self.network.find(host)
        if host in self.network.wedged or self.network.faults(self.local.name, there.local.name).silent:
            await asyncio.sleep(max(0.0, deadline - time.monotonic()))
            raise DeadlinePassed(f"fake://{host} did not answer in time")
        if there is self:
            raise PeerRefused(f"fake://{host} is this daemon itself")
        out, back = (
            self.network.faults(self.local.name, there.local.name),
            self.network.faults(there.local.name, self.local.name),
        )
        planes, channels = (_Plane(out), _Plane(back)), (_Channel(out), _Channel(back))
        ours = Session(channels[0], planes[0], service, self.local, self.limits, there.local.name, url)
        theirs = Session(channels[1], planes[1], their_service, there.local, there.limits, self.local.name, "fake")
        channels[0].other, channels[1].other = theirs, ours
        for plane, other, into in ((planes[0], theirs, planes[1]), (planes[1], ours, planes[0])):
            plane.other, plane.into = other, into
        for transport, session in ((self, ours), (there, theirs)):
            transport.sessions.add(session)
            session.on_closed = transport.sessions.discard
            session.start()
        their_service.connected(theirs)
        return ours

    async def close(self) -> None:
        self.network.remove(self)
        await asyncio.gather(*(session.close("the daemon stops") for session in list(self.sessions)))

"""The plane of tcp://: bytes over sockets of their own, two blocking threads for each, straight between the arenas.

A frame is a header of fixed size and the bytes of one segment. The sender hands headers and arena views to sendmsg in one list;
the receiver reads a header, asks the ledger where the bytes go, and receives into that place: in compiled code, which makes the
digest while the bytes are in the processor's cache, or without a compiler (and for TLS) in Python. Bytes that nobody wants any
more go into a scratch buffer, so a stream never stops for them and never writes them anywhere else.

Threads wake every _TICK_S, so a slot that was cancelled is left within that time even when its bytes have stopped coming.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pdserve.chunk import KEY_BYTES
from pdserve.errors import ProtocolError
from pdserve.kernels import receive
from pdserve.transfer.transports.base import Expected, Outcome, PeerLost
from pdserve.transfer.transports.outbox import Segment
from pdserve.transfer.transports.session import Session
from pdserve.transfer.transports.tls import TlsPipe
from pdserve.transfer.transports.tuner import Tuner

#: ticket, key, shard, digest of the piece, bytes of the piece, offset in it, bytes that follow
_HEADER = struct.Struct(f"<Q{KEY_BYTES}sHQQQQ")
_TICK_S = 0.1
#: bytes and segments that one sendmsg takes at most: few calls for small pieces, and no stream hoards what others could send
_BATCH_BYTES = 1 << 20
_BATCH = 256
_SCRATCH = 256 << 10
#: below this, one more system call for the next header would cost more than it brings
_GATHER_BELOW = 128 << 10
#: Bytes that the kernel holds and has not sent: the rest waits in the arena. Acknowledgements arrive on the peer's core where both
#: ends share a host's links (veth), and what they let go is sent from there while the sender goes on from its own: the two overtake
#: each other, are taken for losses, and the smaller window leaves yet more to be sent by acknowledgements. With little unsent there
#: is nothing to send from there. A sender is woken more often for less.
_UNSENT = 512 << 10
#: Linux's; Python 3.12 and newer name it
_TCP_NOTSENT_LOWAT = 25
_IDLE_S = 2.0
_LAST_WORDS_S = 0.1


def prepare(sock: socket.socket) -> None:
    """Socket options of a stream: timeouts in the kernel (no poll before each call), little unsent, cubic where there is a choice."""
    sock.setblocking(True)
    tick = struct.pack("ll", 0, int(_TICK_S * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, tick)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):  # a kernel without it
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _UNSENT)
    with contextlib.suppress(OSError):  # a kernel without it; bbr costs a fifth on fast links
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")


class _Stop(Exception):
    """The session is over; this thread too."""


class _Filled(NamedTuple):
    """What came into a slot."""

    size: int
    #: bytes of the next header that came with it
    beyond: int
    #: of the piece's digest, where it was made on the way
    part: int | None = None


class Stream:
    """One socket with its two threads."""

    def __init__(self, plane: Streams, session: Session, sock: socket.socket, pipe: TlsPipe | None, index: int) -> None:
        prepare(sock)
        self._plane, self._session, self._sock, self._pipe = plane, session, sock, pipe
        self._index = index
        self._memory = memoryview(session.local.arena)
        self._scratch = memoryview(bytearray(_SCRATCH))
        self._header = np.zeros(_HEADER.size, np.uint8)
        self._compiled = pipe is None and receive.available()
        names = (f"tcp-{role}-{session.peer}-{index}" for role in ("send", "recv"))
        self.threads = [
            threading.Thread(target=self._guarded, args=(job,), name=name, daemon=True)
            for job, name in zip((self._send_all, self._receive_all), names, strict=True)
        ]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def shut(self) -> None:
        """Wakes both threads and lets neither move another byte."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def _guarded(self, job: object) -> None:
        assert callable(job)
        reason = ""
        try:
            job()
        except _Stop:
            pass
        except (OSError, PeerLost, ProtocolError) as e:
            reason = f"stream {self._index}: {e}" if str(e) else f"stream {self._index} broke: {e!r}"
        except Exception as e:  # noqa: BLE001 - a thread that dies silently would leave slots lent for ever
            reason = f"stream {self._index} failed: {e!r}"
        finally:
            self._session.post(self._plane.ended, self, reason)

    # ---- sending ----

    def _send_all(self) -> None:
        outbox, tuner = self._session.outbox, self._plane.tuner
        while not outbox.closed:
            if self._index >= tuner.count:
                self._plane.more_streams.wait(_IDLE_S)
                continue
            segments = outbox.take(_BATCH_BYTES, _BATCH, _IDLE_S)
            if segments:
                self._send(segments)

    def _send(self, segments: Sequence[Segment]) -> None:
        buffers: list[memoryview | bytes] = []
        size = 0
        for s in segments:
            piece, start = s.piece, s.piece.offset + s.start
            buffers.append(
                _HEADER.pack(s.ticket, piece.key, piece.shard, piece.digest, piece.length, s.start, s.length)
            )
            buffers.append(self._memory[start : start + s.length])
            size += s.length
        try:
            if self._pipe is not None:
                for buffer in buffers:
                    self._write([self._pipe.encrypt(buffer)])
            else:
                self._write(buffers)
            self._plane.sent(size)
        finally:
            del buffers
            self._session.outbox.gone(segments)

    def _write(self, buffers: list[memoryview | bytes]) -> None:
        """All of it. A peer that does not read holds us up; whoever waits for the arena cuts the stream then (interrupt)."""
        outbox = self._session.outbox
        first = 0
        while first < len(buffers):
            try:
                gone = self._sock.sendmsg(buffers[first:] if first else buffers)
            except BlockingIOError:
                if outbox.closed:
                    raise _Stop from None
                continue
            while gone and gone >= len(buffers[first]):
                gone -= len(buffers[first])
                first += 1
            if gone:
                buffers[first] = memoryview(buffers[first])[gone:]

    # ---- receiving ----

    def _receive_all(self) -> None:
        header = memoryview(self._header)
        have = 0
        while True:
            self._fill(header[have:])
            have = self._receive(header)

    def _receive(self, header: memoryview) -> int:
        """One segment, whose header has come. Returns how many bytes of the next header came with it."""
        ticket, key, shard, digest, total, offset, length = _HEADER.unpack(header)
        ledger = self._session.ledger
        if not 0 < length <= total or total > len(self._memory):
            raise ProtocolError(f"a frame of {length} bytes for a piece of {total}")
        view = ledger.enter(ticket, key, shard, total, offset, length, digest)
        if view is None:
            self._drain(length)
            return 0
        filled, problem = _Filled(0, 0), Outcome("lost", "the connection ended in the middle of the bytes")
        try:
            filled = self._fill_slot(view, header, ticket, ledger.word_of(offset, length, total))
            problem = Outcome("cancelled", "it was not wanted any more")  # the ledger knows better why
        finally:
            del view
            whole = filled.size == length
            self._plane.received(length if whole else 0)
            ledger.leave(ticket, length if whole else 0, None if whole else problem, filled.part)
        if whole:
            self._session.consumed(length)
        else:
            self._drain(length - filled.size, of=length)
        return filled.beyond

    def _fill_slot(self, view: memoryview, header: memoryview, ticket: int, word: int | None) -> _Filled:
        """Receives into the slot until it is full or nobody wants it. `word`: see Ledger.word_of()."""
        if self._compiled:
            return self._fill_compiled(np.frombuffer(view, np.uint8), ticket, word)
        filled = self._fill_plainly(view, header, ticket)
        if word is None or filled.size < len(view) or not receive.available():
            return filled
        return filled._replace(part=receive.part(np.frombuffer(view, np.uint8), word))

    def _fill_compiled(self, to: np.ndarray, ticket: int, word: int | None) -> _Filled:
        arrival = receive.Arrival(digested=to.nbytes if word is None else 0)
        while self._session.ledger.wanted(ticket):
            if receive.receive(self._sock.fileno(), to, self._header, word or 0, _TICK_S, arrival):
                break
            self._must_live()
        return _Filled(arrival.done, arrival.beyond, None if word is None else arrival.sum)

    def _fill_plainly(self, view: memoryview, header: memoryview, ticket: int) -> _Filled:
        filled, size = 0, len(view)
        ledger = self._session.ledger
        while filled < size:
            if not ledger.wanted(ticket):
                break
            try:
                if self._pipe is not None:
                    filled += self._decrypted(view[filled:])
                elif size < _GATHER_BELOW:
                    got = self._sock.recvmsg_into([view[filled:], header])[0]
                    _must(got)
                    filled += got
                else:
                    got = self._sock.recv_into(view[filled:], 0, socket.MSG_WAITALL)
                    _must(got)
                    filled += got
            except BlockingIOError:
                self._must_live()
        return _Filled(min(filled, size), max(0, filled - size))

    def _fill(self, view: memoryview) -> None:
        filled = 0
        while filled < len(view):
            try:
                if self._pipe is not None:
                    filled += self._decrypted(view[filled:])
                else:
                    got = self._sock.recv_into(view[filled:])
                    _must(got)
                    filled += got
            except BlockingIOError:
                self._must_live()

    def _drain(self, size: int, of: int | None = None) -> None:
        """Bytes that nobody wants, read and thrown away."""
        left = size
        while left:
            part = min(left, _SCRATCH)
            self._fill(self._scratch[:part])
            left -= part
        self._plane.drained(size)
        self._session.consumed(size if of is None else of)

    def _decrypted(self, view: memoryview) -> int:
        assert self._pipe is not None
        got = self._pipe.read_into(view)
        if not got:
            came = self._sock.recv_into(self._scratch)
            _must(came)
            self._pipe.feed(self._scratch[:came])
        return got

    def _must_live(self) -> None:
        if self._session.closed:
            raise _Stop


def _must(got: int) -> None:
    if not got:
        raise PeerLost("the peer hung up")


class Streams:
    """Implements session.Plane. The dialler adds the streams it dialled, the listener those that came."""

    def __init__(self, most: int, adapt: bool = True) -> None:
        self.tuner = Tuner(1, adapt)
        self.more_streams = threading.Event()
        self._most = most
        self._session: Session | None = None
        self._streams: list[Stream] = []
        self._ended: dict[Stream, int] = {}
        self._all_ended = asyncio.Event()
        self._closing = False
        self._count = threading.Lock()
        self._sent = self._received = self._drained = 0

    def start(self, session: Session) -> None:
        self._session = session

    def add(self, sock: socket.socket, pipe: TlsPipe | None) -> None:
        """One more stream; owns the socket from here on."""
        assert self._session is not None
        if self._closing or len(self._streams) >= self._most:
            sock.close()
            raise PeerLost("no more streams are taken here")
        stream = Stream(self, self._session, sock, pipe, len(self._streams))
        self._streams.append(stream)
        self.tuner.allow(len(self._streams))
        stream.start()

    def message(self, payload: bytes) -> None:
        raise ProtocolError("tcp streams have nothing to say")

    def lent(self, ticket: int, expected: Expected) -> None:
        """Streams ask the ledger for every segment."""

    def unwanted(self, tickets: list[int]) -> None:
        """Streams ask the ledger for every segment."""

    def interrupt(self) -> None:
        for stream in self._streams:
            stream.shut()

    async def close(self) -> None:
        self._closing = True
        self.more_streams.set()
        for stream in self._streams:
            stream.shut()
        while any(self._ended.get(stream, 0) < 2 for stream in self._streams):
            self._all_ended.clear()
            await self._all_ended.wait()
        for stream in self._streams:
            for thread in stream.threads:
                thread.join()  # it has said its last word; what is left is microseconds
            stream.close()
        # Sessions are in cycles, which the daemon collects seldom: their buffers must not wait for that.
        self._streams.clear()
        self._ended.clear()

    def ended(self, stream: Stream, reason: str) -> None:
        """One of the stream's threads is done; on the loop."""
        self._ended[stream] = self._ended.get(stream, 0) + 1
        self._all_ended.set()
        if reason and self._session is not None:
            # The control way knows the reason better, if the peer has said one: it gets a moment to come in.
            self._session.loop.call_later(_LAST_WORDS_S, self._session.lost, reason)

    def sent(self, size: int) -> None:
        assert self._session is not None
        with self._count:
            self._sent += size
        before = self.tuner.count
        self.tuner.sent(size, time.monotonic(), self._session.outbox.queued_bytes > 0)
        if self.tuner.count > before:
            self.more_streams.set()
            self.more_streams.clear()

    def received(self, size: int) -> None:
        with self._count:
            self._received += size

    def drained(self, size: int) -> None:
        with self._count:
            self._drained += size

    def stats(self) -> dict[str, int | float | str]:
        return {
            "sent_bytes": self._sent,
            "received_bytes": self._received,
            "drained_bytes": self._drained,
            "streams": len(self._streams),
            "streams_used": self.tuner.count,
        }

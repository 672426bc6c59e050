"""What an engine calls: lookup, reserve, commit, release. Synchronous, thread-safe, every call with a deadline.

A daemon that is gone, hung or slow costs one deadline, then nothing for a moment: calls fail at once with
CacheUnavailable until the next attempt is due. The caller computes instead.

A thread of the client's own tends the connection from the first call on: it notices a daemon that goes, connects again
when one is back (no request is needed for that), and hands back what a late answer brings to a call that gave up.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from pdserve import log
from pdserve.errors import CacheUnavailable, ProtocolError
from pdserve.transfer import arena, wire
from pdserve.transfer.arena import Arena

CONNECT_S = 2.0
#: how long calls fail at once after a failed connect, and after a call that was not answered in time
RETRY_S = 0.5
SLOW_S = 1.0
#: calls with less time than this leave connecting again to the background: mapping a large arena takes longer
PATIENT_S = 1.0
_CHUNK = 1 << 18
#: answers that nobody waits for: so many may lie unread until a call comes by
MANY = 64


class _Dialled(NamedTuple):
    """A connection that has been greeted."""

    socket: socket.socket
    reader: wire.FrameReader
    frames: list[bytes]
    welcome: wire.Welcome
    arena: Arena


class CacheClient:
    """One connection to the daemon at `path`. `arena` and `daemon_id` belong to the present connection.

    Offsets that the daemon gave are good only together with its `daemon_id`: after a restart they mean nothing.
    """

    def __init__(self, path: Path | str, name: str) -> None:
        self._path, self._name = str(path), name
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._reader = wire.FrameReader()
        self._frames: list[bytes] = []
        self._next_id = 0
        #: calls that were given up while their answer may still come
        self._given_up: set[int] = set()
        self._not_before = 0.0
        self._warned = False
        self._closed = False
        self._wake = -1
        self._keeper: threading.Thread | None = None
        self._log = log.get("cache-client")
        self.arena: Arena | None = None
        self.daemon_id = ""
        #: changes when chunks that were stored may be gone for another reason than lack of room
        self.content: tuple[str, int] = ("", 0)
        self.chunk_tokens = 0

    # ---- calls ----

    def push(self, target: str, keys: list[bytes], timeout: float) -> int:
        """Asks for these to be sent to the daemon of another host as they are committed; how many it took note of."""
        return self._count(self._call(lambda i: wire.Push(i, target, keys), timeout))

    def lookup(self, keys: list[bytes], timeout: float, prefill_speed: float = 0.0) -> wire.LookupReply:
        reply = self._call(lambda i: wire.Lookup(i, keys, prefill_speed), timeout)
        assert isinstance(reply, wire.LookupReply)
        self.content = (self.daemon_id, reply.epoch)
        return reply

    def reserve(self, writer: str, items: list[wire.ReserveItem], timeout: float) -> list[wire.Grant]:
        reply = self._call(lambda i: wire.Reserve(i, writer, items), timeout)
        assert isinstance(reply, wire.ReserveReply)
        return reply.grants

    def commit(self, items: list[wire.CommitItem], timeout: float) -> int:
        return self._count(self._call(lambda i: wire.Commit(i, items), timeout))

    def abort(self, reservations: list[int], timeout: float) -> int:
        return self._count(self._call(lambda i: wire.Abort(i, reservations), timeout))

    def release(
        self,
        lease: int,
        timeout: float,
        loaded_chunks: int = 0,
        loaded_bytes: int = 0,
        corrupt: list[bytes] | None = None,
    ) -> int:
        return self._count(
            self._call(lambda i: wire.Release(i, lease, loaded_chunks, loaded_bytes, corrupt or []), timeout)
        )

    def release_soon(
        self, lease: int, loaded_chunks: int = 0, loaded_bytes: int = 0, corrupt: list[bytes] | None = None
    ) -> None:
        """release() for who has no time for the answer: the next call finds it, or the keeper where there are many. Raises
        CacheUnavailable where there is no connection; the daemon has then taken the lease back."""
        if not self._lock.acquire(timeout=SLOW_S):
            raise CacheUnavailable("another call holds the connection")
        try:
            if self._socket is None:
                raise CacheUnavailable("there is no connection")
            many = len(self._given_up) >= MANY
            self._send_back(lambda i: wire.Release(i, lease, loaded_chunks, loaded_bytes, corrupt or []), nudge=many)
        except OSError as e:
            self._disconnect()
            self._lost(e)
        finally:
            self._lock.release()

    def prefetch(self, keys: list[bytes], timeout: float) -> int:
        """Has the run of these keys brought up from the lower tiers; how many of them are on their way. Holds nothing."""
        return self._count(self._call(lambda i: wire.Prefetch(i, keys), timeout))

    def ping(self, timeout: float) -> None:
        self._call(wire.Ping, timeout)

    def connect(self, timeout: float = CONNECT_S) -> None:
        """Connects now instead of at the first call. Raises CacheUnavailable."""
        with self._lock:
            self._ensure(time.monotonic() + timeout)

    @property
    def connected(self) -> bool:
        return self._socket is not None

    def close(self) -> None:
        """For good. Whoever still copies from or into the arena must have stopped before."""
        with self._lock:
            keeper, self._keeper = self._keeper, None
            self._closed = True
            self._disconnect()
        if keeper is not None:
            keeper.join(2 * CONNECT_S)
            if not keeper.is_alive():
                wake, self._wake = self._wake, -1
                os.close(wake)

    # ---- inside; the lock is held ----

    @staticmethod
    def _count(reply: wire.Reply) -> int:
        assert isinstance(reply, wire.Ok)
        return reply.count

    def _call(self, make: Callable[[int], wire.Request], timeout: float) -> wire.Reply:
        deadline = time.monotonic() + timeout
        if not self._lock.acquire(timeout=timeout):
            raise CacheUnavailable("another call holds the connection")
        try:
            for attempt in (1, 2):
                fresh = self._socket is None
                self._ensure(deadline, again=timeout >= PATIENT_S)
                self._next_id += 1
                try:
                    return self._exchange(self._next_id, make(self._next_id), deadline)
                except TimeoutError:
                    # The answer may still come: the keeper takes it. A frame that was half sent is another matter.
                    self._given_up.add(self._next_id)
                    self._nudge()
                    self._not_before = time.monotonic() + SLOW_S
                    raise CacheUnavailable(f"the cache daemon did not answer within {timeout * 1000:.0f} ms") from None
                except (OSError, ProtocolError) as e:
                    self._disconnect()
                    # A connection that was idle may have ended long ago, with a new daemon waiting: try that one, once.
                    if fresh or attempt == 2 or isinstance(e, ProtocolError):
                        self._lost(e)
            raise AssertionError("unreachable")
        finally:
            self._lock.release()

    def _lost(self, cause: Exception) -> NoReturn:
        self._not_before = time.monotonic() + RETRY_S
        if not self._warned:
            self._warned = True
            self._log.warning(
                "cache daemon at %s not available (%s); requests are computed without it until it is back",
                self._path,
                cause,
            )
        raise CacheUnavailable(f"no cache daemon at {self._path}: {cause}") from cause

    def _ensure(self, deadline: float, *, again: bool = True) -> None:
        """There is a connection after it. `again`: not only the first one may be made here."""
        if self._closed:
            raise CacheUnavailable("the cache client is closed")
        if self._keeper is None:
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._keeper = threading.Thread(target=self._keep, name=f"pdserve-cache-{self._name}", daemon=True)
            self._keeper.start()
            again = True
        if time.monotonic() < self._not_before:
            raise CacheUnavailable("the cache daemon was not available a moment ago")
        if self._socket is not None:
            return
        if not again:
            raise CacheUnavailable("the cache daemon was lost; connecting again in the background")
        try:
            dialled = self._dial(deadline)
        except (OSError, ProtocolError, CacheUnavailable) as e:
            self._lost(e)
        self._install(dialled)

    def _install(self, dialled: _Dialled) -> None:
        self._socket, self._reader, self._frames = dialled.socket, dialled.reader, dialled.frames
        self.arena = dialled.arena
        self.daemon_id, self.chunk_tokens = dialled.welcome.daemon_id, dialled.welcome.chunk_tokens
        self._not_before = 0.0
        if self._warned:
            self._log.warning("cache daemon at %s is back", self._path)
        self._warned = False
        self._nudge()

    def _disconnect(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
        self._socket = None
        self._given_up.clear()
        # Not closed: a thread may still be copying. Its reference keeps the old mapping until it is done.
        self.arena = None
        self.daemon_id = ""
        self._nudge()

    def _exchange(self, call_id: int, message: wire.Request, deadline: float) -> wire.Reply:
        assert self._socket is not None
        frame = wire.encode(message)
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            self._socket.sendall(frame)
        except TimeoutError as e:
            # Part of the frame may be out: nothing sensible can follow it on this connection.
            raise ConnectionAbortedError("the daemon stopped reading") from e
        while True:
            reply = _receive(self._socket, self._reader, self._frames, deadline)
            if getattr(reply, "id", call_id) != call_id:
                self._too_late(reply)
                continue
            if isinstance(reply, wire.Refused):
                raise ProtocolError(reply.reason)
            return reply

    def _too_late(self, reply: wire.Reply) -> None:
        """The answer to a call that gave up: the lease or the space that it brings is nobody's, and goes back at once."""
        self._given_up.discard(getattr(reply, "id", 0))
        if isinstance(reply, wire.LookupReply) and reply.lease:
            self._send_back(lambda i: wire.Release(i, reply.lease))
        elif isinstance(reply, wire.ReserveReply):
            granted = [g.reservation for g in reply.grants if g.status == wire.GRANTED]
            if granted:
                self._send_back(lambda i: wire.Abort(i, granted))

    def _send_back(self, make: Callable[[int], wire.Request], *, nudge: bool = True) -> None:
        assert self._socket is not None
        self._next_id += 1
        self._given_up.add(self._next_id)  # nobody waits for its answer
        self._socket.settimeout(SLOW_S)
        try:
            self._socket.sendall(wire.encode(make(self._next_id)))
        except TimeoutError as e:
            raise ConnectionAbortedError("the daemon stopped reading") from e
        if nudge:
            self._nudge()

    def _nudge(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    # ---- the keeper's thread; the lock is not held ----

    def _dial(self, deadline: float) -> _Dialled:
        """A greeted connection, with the arena mapped. Changes nothing of the client's."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(0.001, min(CONNECT_S, deadline - time.monotonic())))
            connection.connect(self._path)
            reader, frames = wire.FrameReader(), list[bytes]()
            connection.sendall(wire.encode(wire.Hello(wire.VERSION, self._name, os.getpid())))
            welcome = _receive(connection, reader, frames, deadline)
            if isinstance(welcome, wire.Refused):
                raise ProtocolError(welcome.reason)
            if not isinstance(welcome, wire.Welcome):
                raise ProtocolError(f"the daemon greeted with a {type(welcome).__name__}")
            mapped = arena.attach(Path(welcome.arena_path), welcome.arena_bytes)
        except BaseException:
            connection.close()
            raise
        return _Dialled(connection, reader, frames, welcome, mapped)

    def _keep(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
                there = self._socket
                poll = select.poll()
                poll.register(self._wake, select.POLLIN)
                if there is not None:
                    # Answers that somebody waits for wake only whoever waits.
                    poll.register(there, select.POLLRDHUP | (select.POLLIN if self._given_up else 0))
            # A socket that is closed meanwhile stays open until this returns: hence the nudge in _disconnect().
            poll.poll(None if there is not None else RETRY_S * 1000)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            if there is None:
                self._dial_again()
            else:
                self._look_after(there)

    def _dial_again(self) -> None:
        with self._lock:
            wait = self._not_before - time.monotonic()
            if self._closed or self._socket is not None or wait > 0:
                return
        try:
            dialled = self._dial(time.monotonic() + CONNECT_S)
        except (OSError, ProtocolError, CacheUnavailable) as e:
            with self._lock, contextlib.suppress(CacheUnavailable):
                if not self._closed and self._socket is None:
                    self._lost(e)
            return
        with self._lock:
            if self._closed or self._socket is not None:
                dialled.socket.close()
            else:
                self._install(dialled)

    def _look_after(self, there: socket.socket) -> None:
        """Takes the late answers that have come; sees that the daemon is gone."""
        with self._lock:
            if self._socket is not there:
                return
            try:
                there.settimeout(0)
                data = there.recv(_CHUNK)
                if not data:
                    raise ConnectionResetError("the daemon closed the connection")
                self._frames.extend(self._reader.feed(data))
                while self._frames:
                    self._too_late(wire.decode_reply(self._frames.pop(0)))
            except BlockingIOError:
                pass  # somebody else has taken it
            except (OSError, ProtocolError) as e:
                self._disconnect()
                with contextlib.suppress(CacheUnavailable):
                    self._lost(e)


def _receive(connection: socket.socket, reader: wire.FrameReader, frames: list[bytes], deadline: float) -> wire.Reply:
    """The next answer; `frames` keeps those that came along with it."""
    while not frames:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        data = connection.recv(_CHUNK)
        if not data:
            raise ConnectionResetError("the daemon closed the connection")
        frames.extend(reader.feed(data))
        if time.monotonic() > deadline and not frames:
            raise TimeoutError
    return wire.decode_reply(frames.pop(0))

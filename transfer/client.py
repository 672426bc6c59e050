"""What an engine calls: lookup, reserve, commit, release. Synchronous, thread-safe, every call with a deadline.

A daemon that is gone, hung or slow costs one deadline, then nothing for a moment: calls fail at once with
CacheUnavailable until the next attempt is due. The caller computes instead. Reconnecting is automatic.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from pdserve import log
from pdserve.errors import CacheUnavailable, ProtocolError
from pdserve.transfer import arena, wire
from pdserve.transfer.arena import Arena

CONNECT_S = 2.0
#: how long calls fail at once after a failed connect, and after a call that was not answered in time
RETRY_S = 0.5
SLOW_S = 1.0
_CHUNK = 1 << 18


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
        self._not_before = 0.0
        self._warned = False
        self._closed = False
        self._log = log.get("cache-client")
        self.arena: Arena | None = None
        self.daemon_id = ""
        self.chunk_tokens = 0

    # ---- calls ----

    def lookup(self, keys: list[bytes], timeout: float) -> wire.LookupReply:
        reply = self._call(lambda i: wire.Lookup(i, keys), timeout)
        assert isinstance(reply, wire.LookupReply)
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
            self._closed = True
            self._disconnect()

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
                self._ensure(deadline)
                self._next_id += 1
                try:
                    return self._exchange(self._next_id, make(self._next_id), deadline)
                except TimeoutError:
                    # The answer may still come; it is recognised by its id and thrown away. A frame that was half sent is not.
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

    def _ensure(self, deadline: float) -> None:
        if self._closed:
            raise CacheUnavailable("the cache client is closed")
        if time.monotonic() < self._not_before:
            raise CacheUnavailable("the cache daemon was not available a moment ago")
        if self._socket is not None:
            return
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(0.001, min(CONNECT_S, deadline - time.monotonic())))
            connection.connect(self._path)
            self._socket, self._reader, self._frames = connection, wire.FrameReader(), []
            connection.sendall(wire.encode(wire.Hello(wire.VERSION, self._name, os.getpid())))
            welcome = self._receive(deadline)
            if isinstance(welcome, wire.Refused):
                raise ProtocolError(welcome.reason)
            if not isinstance(welcome, wire.Welcome):
                raise ProtocolError(f"the daemon greeted with a {type(welcome).__name__}")
            self.arena = arena.attach(Path(welcome.arena_path), welcome.arena_bytes)
        except (OSError, ProtocolError, CacheUnavailable) as e:
            connection.close()
            self._socket = None
            self._lost(e)
        self.daemon_id, self.chunk_tokens = welcome.daemon_id, welcome.chunk_tokens
        if self._warned:
            self._log.warning("cache daemon at %s is back", self._path)
        self._warned = False

    def _disconnect(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
        self._socket = None
        # Not closed: a thread may still be copying. Its reference keeps the old mapping until it is done.
        self.arena = None
        self.daemon_id = ""

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
            reply = self._receive(deadline)
            if getattr(reply, "id", call_id) != call_id:
                # The late answer of a call that gave up. A lease that it brings is nobody's: back with it at once.
                if isinstance(reply, wire.LookupReply) and reply.lease:
                    self._socket.sendall(wire.encode(wire.Release(0, reply.lease)))
                continue
            if isinstance(reply, wire.Refused):
                raise ProtocolError(reply.reason)
            return reply

    def _receive(self, deadline: float) -> wire.Reply:
        assert self._socket is not None
        while not self._frames:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            data = self._socket.recv(_CHUNK)
            if not data:
                raise ConnectionResetError("the daemon closed the connection")
            self._frames.extend(self._reader.feed(data))
            if time.monotonic() > deadline and not self._frames:
                raise TimeoutError
        return wire.decode_reply(self._frames.pop(0))

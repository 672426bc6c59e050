"""Chunks in Redis or Valkey: one key for the record, one for each shard, set together and given the same time to live.

The values are written in one MULTI/EXEC, sent in one go: a writer that dies before EXEC has left nothing. They are read in
one MGET, which is atomic as well, so record and shards belong together. The server may evict a shard on its own
(maxmemory-policy); then the chunk is a miss and its record is removed. A server that is full and may not evict refuses.

Each of the tier's threads has a connection of its own, used below redis-py's client class: the deadline of a call shuts its
socket down (offload.py). Redis Cluster's redirections are not followed; all keys of a chunk share a hash tag, so that a
proxy in front of a cluster works.
"""

from __future__ import annotations

import contextlib
import importlib
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from pdserve.errors import ConfigError
from pdserve.transfer.tiers import envelope
from pdserve.transfer.tiers.base import ChunkRecord, CorruptChunk, TierError
from pdserve.transfer.tiers.offload import Offload, Operation

#: the server's own bound on a value
MAX_VALUE = 512 << 20
_BATCH = 512
_READ_SIZE = 1 << 20
#: shards outlive their record, so that a record that is seen can still be read
_GRACE_S = 60


class RedisOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be set; registry.py fills it from a URL's query."""

    host: str = "127.0.0.1"
    port: int = 6379
    db: int = 0
    username: str = ""
    password: str = ""
    #: file that holds the password; read at each connection, so that it may change
    password_file: str = ""
    tls: bool = False
    #: PEM file of the authority that signed the server's certificate (default: the system's)
    ca: str = ""
    #: client certificate and its key, where the server asks for one
    cert: str = ""
    cert_key: str = ""
    #: seconds that a chunk lives after it was stored; 0 for ever
    ttl: Annotated[int, msgspec.Meta(ge=0)] = 86400
    prefix: str = "pdserve"
    #: seconds that contains() and delete() may take
    timeout: float = 1.0
    connections: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4


class RedisTier:
    """See the module's head."""

    def __init__(self, options: RedisOptions) -> None:
        self.name = "redis"
        self._options = options
        self._redis: Any = _library()
        self._errors = (self._redis.exceptions.RedisError, OSError)
        self._lines = threading.local()
        self._all_lines: list[_Line] = []
        self._state = "ok"
        self._io = Offload(self.name, options.connections)

    def contains(self, keys: list[bytes]) -> list[ChunkRecord | None]:
        def job(operation: Operation) -> list[Any]:
            batches = [keys[i : i + _BATCH] for i in range(0, len(keys), _BATCH)]
            commands = [("MGET", *(self._record_key(key) for key in batch)) for batch in batches]
            return [value for values in self._ask(commands, operation) for value in values]

        values = self._io.call(job, self._soon())
        found = [envelope.read_header(v, k, pad=1) if v else None for k, v in zip(keys, values, strict=True)]
        self._state = "ok"
        return found

    def get(self, record: ChunkRecord, into: list[np.ndarray], deadline: float) -> bool:
        def job(operation: Operation) -> bool:
            names = self._names(record)
            ((head, *shards),) = self._ask([("MGET", *names)], operation)
            if head != envelope.header(record, pad=1):
                return False  # gone, or another writer's
            if None in shards:
                self._ask([("UNLINK", *names)], operation)
                return False
            if any(len(shard) != record.shard_bytes for shard in shards):
                self._ask([("UNLINK", *names)], operation)
                raise CorruptChunk(
                    f"redis: shards of {[len(s) for s in shards]} bytes, not {record.shard_bytes}; removed"
                )
            for to, shard in zip(into, shards, strict=True):
                operation.copy(to, shard)
            return True

        found = self._io.call(job, deadline)
        self._state = "ok"
        return found

    def put(self, record: ChunkRecord, payload: list[np.ndarray], deadline: float) -> bool:
        if record.shard_bytes > MAX_VALUE:
            return False

        def job(operation: Operation) -> bool:
            copy = self._line().scratch(record.payload_bytes).reshape(len(payload), record.shard_bytes)
            for mine, part in zip(copy, payload, strict=True):
                operation.copy(mine, part)
            head, *shards = self._names(record)
            commands: list[tuple[Any, ...]] = [("MULTI",)]
            commands += [self._set(n, memoryview(part), _GRACE_S) for n, part in zip(shards, copy, strict=True)]
            commands += [self._set(head, envelope.header(record, pad=1), 0), ("EXEC",)]
            self._ask(commands, operation)
            return True

        try:
            stored = self._io.call(job, deadline)
        except _Full as e:
            self._state = f"full: {e}"
            return False
        self._state = "ok"
        return stored

    def delete(self, keys: list[bytes]) -> int:
        def job(operation: Operation) -> int:
            # How many shards there are stands in the record; what a damaged record leaves goes with its time to live.
            records = [
                envelope.read_header(v, k, pad=1) if v else None for k, v in zip(keys, read(operation), strict=True)
            ]
            names = [n for r in records if r is not None for n in self._names(r)[1:]]
            heads = [self._record_key(key) for key in keys]
            gone, *_ = self._ask([("UNLINK", *heads), *([("UNLINK", *names)] if names else [])], operation)
            return int(gone)

        def read(operation: Operation) -> list[Any]:
            (values,) = self._ask([("MGET", *(self._record_key(key) for key in keys))], operation)
            return list(values)

        return self._io.call(job, self._soon()) if keys else 0

    def listing(self, deadline: float) -> Iterator[ChunkRecord]:
        """With SCAN, which holds nobody up; what is stored meanwhile may be missed."""
        pattern = f"{self._options.prefix}:{{*}}:record"

        def job(cursor: bytes, operation: Operation) -> tuple[bytes, list[tuple[bytes, Any]]]:
            ((after, names),) = self._ask([("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)], operation)
            values = self._ask([("MGET", *names)], operation)[0] if names else []
            return after, list(zip(names, values, strict=True))

        cursor = b"0"
        while True:
            cursor, found = self._io.call(partial(job, cursor), deadline)
            for name, value in found:
                key = _key_of(name)
                record = envelope.read_header(value, key, pad=1) if key and value else None
                if record is not None:
                    yield record
            if int(cursor) == 0:
                return

    def stats(self) -> dict[str, int | float | str]:
        # Other hosts use the server too: what of it is ours is not known without scanning it.
        address = f"{self._options.host}:{self._options.port}/{self._options.db}"
        return {"chunks": 0, "used_bytes": 0, "capacity_bytes": 0, "state": self._state, "server": address}

    def close(self) -> None:
        self._io.close(2.0)
        while self._all_lines:
            self._all_lines.pop().close()

    # ---- names and commands ----

    def _record_key(self, key: bytes) -> str:
        return f"{self._options.prefix}:{{{key.hex()}}}:record"

    def _names(self, record: ChunkRecord) -> list[str]:
        stem = f"{self._options.prefix}:{{{record.key.hex()}}}"
        return [f"{stem}:record", *(f"{stem}:{i}" for i in range(len(record.digests)))]

    def _set(self, name: str, value: bytes | memoryview, grace: int) -> tuple[Any, ...]:
        life = ("EX", self._options.ttl + grace) if self._options.ttl else ()
        return ("SET", name, value, *life)

    def _soon(self) -> float:
        return time.monotonic() + self._options.timeout

    # ---- on the tier's threads ----

    def _line(self) -> _Line:
        if not hasattr(self._lines, "line"):
            self._lines.line = _Line(self._connect())
            self._all_lines.append(self._lines.line)
        line: _Line = self._lines.line
        return line

    def _password(self) -> str:
        if not self._options.password_file:
            return self._options.password
        return Path(self._options.password_file).read_text().strip()

    def _connect(self) -> Any:
        o = self._options
        common = {
            "host": o.host,
            "port": o.port,
            "db": o.db,
            "username": o.username or None,
            "password": self._password() or None,
            "protocol": 2,
            "socket_timeout": 10.0,  # a thread whose caller left is woken; this is for what cannot be woken
            "socket_connect_timeout": 2.0,
            "socket_read_size": _READ_SIZE,
            "retry": self._redis.retry.Retry(self._redis.backoff.NoBackoff(), 0),
        }
        if not o.tls:
            return self._redis.Connection(**common)
        return self._redis.SSLConnection(
            **common,
            ssl_ca_certs=o.ca or None,
            ssl_certfile=o.cert or None,
            ssl_keyfile=o.cert_key or None,
        )

    def _ask(self, commands: list[tuple[Any, ...]], operation: Operation) -> list[Any]:
        """Sends all commands in one go, returns their answers. The connection starts anew after any error."""
        line = self._line()
        try:
            with operation.woken_by(line.shut):
                try:
                    return line.ask(commands)
                except self._redis.exceptions.TimeoutError:
                    raise
                except (self._redis.exceptions.ConnectionError, OSError):
                    # The server closes connections that are idle, and all of them when it restarts. Every command here
                    # may be carried out twice, so what was tried on an old connection is tried once on a new one.
                    line.close()
                    if operation.over or not line.was_used:
                        raise
                    return line.ask(commands)
        except self._errors as e:
            line.close()
            raise self._mapped(e) from e

    def _mapped(self, e: Exception) -> TierError:
        text = f"redis {self._options.host}:{self._options.port}: {e or type(e).__name__}"
        if isinstance(e, self._redis.exceptions.OutOfMemoryError):
            return _Full(text)
        self._state = text
        return TierError(text)


class _Full(TierError):
    """The server has reached maxmemory and may not evict."""


def _key_of(name: bytes) -> bytes:
    """The chunk's key, from the name of its record; empty when that is none of ours."""
    try:
        return bytes.fromhex(name[name.rindex(b"{") + 1 : name.rindex(b"}")].decode())
    except ValueError:  # a text that is not ASCII is one, too
        return b""


class _Line:
    """One thread's connection, and a buffer for what it sends: the caller's arrays are not read after its deadline."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        #: the connection of the last ask() was there before it
        self.was_used = False
        self._buffer = np.empty(0, np.uint8)

    def ask(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        self.was_used = self.connection.is_connected
        self.connection.connect()
        self.connection.send_packed_command(self.connection.pack_commands(commands))
        answers = [self.connection.read_response() for _ in commands]
        for answer in answers:  # EXEC answers with a list in which commands that failed are errors
            for value in answer if isinstance(answer, list) else ():
                if isinstance(value, Exception):
                    raise value
        return answers

    def scratch(self, nbytes: int) -> np.ndarray:
        if self._buffer.nbytes < nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        return self._buffer[:nbytes]

    def shut(self) -> None:
        """Wakes the thread that reads or writes. Closing is that thread's business."""
        # redis-py names no way to reach the socket from another thread but to close it under the reader's hands.
        sock = self.connection._sock
        if sock is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def close(self) -> None:
        self.connection.disconnect()


def _library() -> Any:
    try:
        module = importlib.import_module("redis")
    except ImportError as e:
        raise ConfigError(
            "cache.tiers", f"a redis:// tier needs the Python package redis ({e})", "Run: pip install 'pdserve[redis]'"
        ) from e
    return module


__all__ = ["MAX_VALUE", "RedisOptions", "RedisTier"]

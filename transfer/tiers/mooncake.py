"""Chunks in a Mooncake Store: memory that other processes lend to a pool, found by way of its master.

A chunk is two objects: its shards one after another under a name made from the record, then the record under the chunk's
key. The record comes last, so what is seen is whole; and since the shards' name depends on the record, two writers of one
chunk never mix. A writer that dies leaves its name taken for a while; the next one uses another of a few. The pool evicts
by itself; shards that are gone make a miss.

The library's calls cannot be interrupted: a silent master holds a thread for its RPC timeout of 30 s. So by default bytes
pass through a registered buffer of the tier's own thread, and a caller leaves at its deadline with its arrays (offload.py).
Worse, connecting holds Python's interpreter lock until the master has answered: 90 s for one that is not there. So a child
process connects first, and only when it could does this one.

With `zero_copy` and the arena registered the store reads and writes the arena itself, without that copy; such a call ends
when the library ends it, deadline or not.
"""

from __future__ import annotations

import http.client
import importlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from blake3 import blake3

from pdserve.chunk import KEY_BYTES
from pdserve.errors import ConfigError
from pdserve.transfer.tiers import envelope
from pdserve.transfer.tiers.base import ChunkRecord, CorruptChunk, TierError
from pdserve.transfer.tiers.offload import DeadlinePassed, Offload, Operation

T = TypeVar("T")
#: the library's error codes that say "not there": no such object, no finished copy of it
_ABSENT = {-704, -703}
_FULL = {-200, -201}
_BATCH = 512
#: how many names the shards of one record may have
_NAMES = 3
_SETTLE_S = 1.0
#: what the master's HTTP side may take to go on, and a line of its list
_LIST_S, _LONGEST_NAME = 10.0, 4096
_PROBE_TCP_S, _PROBE_S = 1.0, 15.0
_PROBE = """
import os, sys
from mooncake.store import MooncakeDistributedStore
local, metadata, protocol, devices, master = sys.argv[1:]
os._exit(MooncakeDistributedStore().setup(local, metadata, 0, 1 << 20, protocol, devices, master) != 0)
"""
#: room for the records that a lookup fetches
_LOCAL_BUFFER = 16 << 20


class MooncakeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be set; registry.py fills it from a URL's query."""

    master: str
    #: where segments find each other: P2PHANDSHAKE, or the URL of a metadata server
    metadata: str = "P2PHANDSHAKE"
    #: tcp or rdma, with the devices to use
    protocol: str = "tcp"
    devices: str = ""
    #: this host's address as the others see it
    local: str = "127.0.0.1"
    #: bytes of memory that this process lends to the pool
    segment: Annotated[int, msgspec.Meta(ge=0)] = 0
    zero_copy: bool = False
    prefix: str = "pdserve"
    #: of the master's HTTP side, the only one that lists what is in the pool
    metrics_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 9003
    #: seconds that contains() and delete() may take
    timeout: float = 1.0
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4


class MooncakeTier:
    """See the module's head."""

    def __init__(self, options: MooncakeOptions) -> None:
        self.name = "mooncake"
        self._options = options
        self._library = _library()
        self._state = "ok"
        self._store: Any = None
        self._connecting = threading.Lock()
        self._registered: list[np.ndarray] = []
        self._staging = threading.local()
        self._running = self._direct_bytes = 0
        self._count = threading.Lock()
        self._closed = False
        self._io = Offload(self.name, options.threads)

    def register(self, arena: np.ndarray) -> None:
        """Lets the store read and write this memory itself, where the options say so. Before the first call."""
        if self._options.zero_copy:
            self._registered.append(arena)

    def contains(self, keys: list[bytes]) -> list[ChunkRecord | None]:
        return self._io.call(partial(self._records_of, keys), self._soon())

    def get(self, record: ChunkRecord, into: list[np.ndarray], deadline: float) -> bool:
        if self._direct(into):
            got = self._unhurried(deadline, lambda store: self._fetch(store, record, into))
            self._moved(max(0, got))
        else:

            def job(operation: Operation) -> int:
                def fetch(store: Any) -> int:
                    staging = self._buffer(store, record.payload_bytes)
                    got = self._fetch(store, record, [staging])
                    if got == staging.nbytes and not operation.over:
                        for i, part in enumerate(into):
                            operation.copy(part, staging[i * part.nbytes : (i + 1) * part.nbytes])
                    return got

                return self._within(fetch)

            got = self._io.call(job, deadline)
        if got in _ABSENT:
            return False
        if got == -600 or (got >= 0 and got != record.payload_bytes):
            self.delete([record.key])
            raise CorruptChunk(f"mooncake: {record.key.hex()} does not have {record.payload_bytes} bytes; removed")
        self._check(got, "get", record.key.hex())
        return True

    def put(self, record: ChunkRecord, payload: list[np.ndarray], deadline: float) -> bool:
        if self._direct(payload):
            stored = self._unhurried(deadline, lambda store: self._store_chunk(store, record, payload))
            self._moved(record.payload_bytes if stored else 0)
            return stored

        def job(operation: Operation) -> bool:
            def send(store: Any) -> bool:
                staging = self._buffer(store, record.payload_bytes)
                for i, part in enumerate(payload):
                    operation.copy(staging[i * part.nbytes : (i + 1) * part.nbytes], part)
                return self._store_chunk(store, record, [staging])

            return self._within(send)

        return self._io.call(job, deadline)

    def delete(self, keys: list[bytes]) -> int:
        def forget(store: Any) -> int:
            gone = 0
            for key, record in zip(keys, self._records(store, keys), strict=True):
                # Not gently: a lease of somebody who reads it now must not keep a damaged chunk in the way.
                gone += store.remove(self._record_name(key), True) == 0
                if record is not None:
                    for name in self._payload_names(record):
                        store.remove(name, True)
            return gone

        return self._io.call(lambda _: self._within(forget), self._soon())

    def listing(self, deadline: float) -> Iterator[ChunkRecord]:
        """By the names that the master tells over HTTP; the library itself has no call for that."""
        names = self._listed_keys(deadline)
        while keys := list(islice(names, _BATCH)):
            records = self._io.call(partial(self._records_of, keys), deadline)
            yield from (record for record in records if record is not None)

    def _listed_keys(self, deadline: float) -> Iterator[bytes]:
        if time.monotonic() > deadline:
            raise TierError("mooncake: deadline passed")
        host, at = self._options.master.rpartition(":")[0].strip("[]"), self._options.metrics_port
        connection = http.client.HTTPConnection(host, at, timeout=_LIST_S)
        ours = re.compile(rf"{re.escape(self._options.prefix)}/([0-9a-f]{{{2 * KEY_BYTES}}})\n?".encode())
        try:
            connection.request("GET", "/get_all_keys")
            answer = connection.getresponse()
            if answer.status != 200:
                raise TierError(f"mooncake: the master at {host}:{at} lists no keys (HTTP {answer.status})")
            while line := answer.readline(_LONGEST_NAME):
                if time.monotonic() > deadline:
                    raise TierError("mooncake: the deadline passed while the master listed its keys")
                if found := ours.fullmatch(line):
                    yield bytes.fromhex(found[1].decode())
        except (OSError, http.client.HTTPException) as e:
            why = f"{host}:{at} does not list the pool's keys ({e or type(e).__name__})"
            raise TierError(f"mooncake: {why}; metrics_port= must be the master's --metrics_port") from e
        finally:
            connection.close()

    def stats(self) -> dict[str, int | float | str]:
        # The pool belongs to all who lend to it: what of it is ours is not known without asking for every key.
        return {
            "chunks": 0,
            "used_bytes": 0,
            "capacity_bytes": 0,
            "state": self._state,
            "zero_copy_bytes": self._direct_bytes,
            "master": self._options.master,
        }

    def close(self) -> None:
        self._closed = True
        self._io.close(2.0)
        with self._count:
            # Closing under a call that hangs in the library would take its memory away; it ends with the process then.
            store, self._store = (self._store, None) if not self._running else (None, self._store)
        if store is not None:
            store.close()

    # ---- names ----

    def _record_name(self, key: bytes) -> str:
        return f"{self._options.prefix}/{key.hex()}"

    def _payload_names(self, record: ChunkRecord) -> list[str]:
        version = blake3(envelope.header(record, pad=1)).hexdigest(length=8)
        return [f"{self._options.prefix}/{record.key.hex()}/{version}.{i}" for i in range(_NAMES)]

    def _soon(self) -> float:
        return time.monotonic() + self._options.timeout

    # ---- with a store at hand ----

    def _records_of(self, keys: list[bytes], _: Operation) -> list[ChunkRecord | None]:
        return self._within(lambda store: self._records(store, keys))

    def _records(self, store: Any, keys: list[bytes]) -> list[ChunkRecord | None]:
        found: list[ChunkRecord | None] = []
        for start in range(0, len(keys), _BATCH):
            batch = keys[start : start + _BATCH]
            names = [self._record_name(key) for key in batch]
            there = store.batch_is_exist(names)
            for code in there:
                self._check(code, "lookup", names[0])
            wanted = [name for name, code in zip(names, there, strict=True) if code == 1]
            values = dict(zip(wanted, store.get_batch(wanted) if wanted else (), strict=True))
            found += [
                envelope.read_header(values[name], key, pad=1) if name in values else None
                for name, key in zip(names, batch, strict=True)
            ]
        self._state = "ok"
        return found

    def _store_chunk(self, store: Any, record: ChunkRecord, parts: list[np.ndarray]) -> bool:
        (there,) = self._records(store, [record.key])
        if there == record and self._find_payload(store, record):
            return True
        if not self._store_payload(store, record, parts):
            return False
        if there is not None and there != record:
            return True  # another writer's is whole and stays; ours ages out
        name = self._record_name(record.key)
        if store.is_exist(name) == 1 and self._records(store, [record.key]) == [None]:
            store.remove(name, True)  # there, but no record
        self._check(store.put(name, envelope.header(record, pad=1)), "put", name)
        ends = time.monotonic() + _SETTLE_S
        while store.is_exist(name) != 1:  # put() also says yes while another writer is at it
            if time.monotonic() > ends:
                raise TierError(f"mooncake: {name} is being written by somebody else")
            time.sleep(0.005)
        return True

    def _store_payload(self, store: Any, record: ChunkRecord, parts: list[np.ndarray]) -> bool:
        sizes = [part.nbytes for part in parts]
        for name in self._payload_names(record):
            (code,) = store.batch_put_from_multi_buffers([name], [_addresses(parts)], [sizes])
            if code in _FULL:
                self._state = f"full: code {code}"
                return False
            self._check(code, "put", name)
            # put() also says yes to a name that another writer has begun, and perhaps never ended.
            if store.get_size(name) == record.payload_bytes:
                return True
        raise TierError(f"mooncake: the names of {record.key.hex()} are taken by writers that did not end")

    def _find_payload(self, store: Any, record: ChunkRecord) -> str:
        """The name under which the shards can be read; empty when they are gone."""
        sizes = ((name, store.get_size(name)) for name in self._payload_names(record))
        return next((name for name, size in sizes if size == record.payload_bytes), "")

    def _fetch(self, store: Any, record: ChunkRecord, parts: list[np.ndarray]) -> int:
        """Bytes read, or the library's error code."""
        sizes = [part.nbytes for part in parts]
        code = 0
        for name in self._payload_names(record):
            (code,) = store.batch_get_into_multi_buffers([name], [_addresses(parts)], [sizes])
            if code not in _ABSENT:
                break
        return code

    def _check(self, code: int, what: str, name: str) -> None:
        if code < 0:
            self._state = f"{what} failed with code {code}"
            raise TierError(f"mooncake: {what} of {name} failed with the library's code {code}")

    # ---- the library ----

    def _within(self, call: Callable[[Any], T]) -> T:
        """Calls with the store, connecting first where that was not done."""
        with self._count:
            if self._closed:
                raise TierError("mooncake: closed")
            self._running += 1
        try:
            return call(self._connected())
        finally:
            with self._count:
                self._running -= 1

    def _connected(self) -> Any:
        with self._connecting:
            if self._store is None:
                o = self._options
                self._try_in_a_child()
                store = self._library.MooncakeDistributedStore()
                words = (o.local, o.metadata, o.segment, _LOCAL_BUFFER, o.protocol, o.devices, o.master)
                if store.setup(*words) != 0:
                    raise self._unreachable("setup failed")
                for memory in self._registered:
                    code = store.register_buffer(memory.ctypes.data, memory.nbytes)
                    self._check(-abs(code), "register", "the arena")
                self._store = store
            return self._store

    def _try_in_a_child(self) -> None:
        """Raises TierError when the master does not answer."""
        o = self._options
        host, _, port = o.master.rpartition(":")
        try:
            socket.create_connection((host, int(port)), _PROBE_TCP_S).close()
            words = [o.local, o.metadata, o.protocol, o.devices, o.master]
            child = [sys.executable, "-P", "-c", _PROBE, *words]
            code = subprocess.run(child, timeout=_PROBE_S, check=False, capture_output=True).returncode
        except (OSError, subprocess.TimeoutExpired) as e:
            raise self._unreachable(str(e)) from e
        if code != 0:
            raise self._unreachable("setup failed")

    def _unreachable(self, why: str) -> TierError:
        self._state = f"the master at {self._options.master} does not answer: {why}"
        return TierError(f"mooncake: {self._state}")

    def _direct(self, parts: list[np.ndarray]) -> bool:
        """All of it lies in memory that the store may use itself."""
        spans = [(m.ctypes.data, m.ctypes.data + m.nbytes) for m in self._registered]
        return all(any(a <= p.ctypes.data and p.ctypes.data + p.nbytes <= b for a, b in spans) for p in parts)

    def _moved(self, nbytes: int) -> None:
        with self._count:
            self._direct_bytes += nbytes

    def _unhurried(self, deadline: float, call: Callable[[Any], T]) -> T:
        """On the caller's own thread, to the end: the arrays are the library's until then."""
        if time.monotonic() > deadline:
            raise DeadlinePassed("mooncake: no answer before the deadline")
        return self._within(call)

    def _buffer(self, store: Any, nbytes: int) -> np.ndarray:
        """This thread's registered buffer."""
        old: np.ndarray | None = getattr(self._staging, "buffer", None)
        if old is None or old.nbytes < nbytes:
            if old is not None:
                store.unregister_buffer(old.ctypes.data)
            new = np.empty(nbytes, np.uint8)
            self._check(-abs(store.register_buffer(new.ctypes.data, nbytes)), "register", "a buffer")
            self._staging.buffer = old = new
        return old[:nbytes]


def _addresses(parts: list[np.ndarray]) -> list[int]:
    return [part.ctypes.data for part in parts]


def _library() -> Any:
    # It writes a line for every connection otherwise; what goes wrong comes back as a code and is in our own log.
    os.environ.setdefault("GLOG_minloglevel", "2")
    try:
        return importlib.import_module("mooncake.store")
    except ImportError as e:
        fix = "Run: pip install 'pdserve[mooncake]'"
        if "libibverbs" in str(e):
            fix = "Install the system library libibverbs (Debian: apt-get install libibverbs1)."
        raise ConfigError("cache.tiers", f"a mooncake:// tier needs Mooncake's Python package ({e})", fix) from e

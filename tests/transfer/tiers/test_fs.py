"""The shared-directory tier: the suite, and what is its own (kill -9, hanging system calls, full, ageing)."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pdserve.transfer.tiers import conformance, envelope, fs
from pdserve.transfer.tiers.base import CorruptChunk, TierError
from pdserve.transfer.tiers.conformance import Subject, make_chunk, read, soon
from pdserve.transfer.tiers.fs import FsOptions, FsTier

# Writes a chunk and is killed by itself in the middle: after the first piece, or when all is written but not yet renamed.
KILLED_WRITER = """
import os, signal, sys, time
from pathlib import Path
import msgspec, numpy as np
from pdserve.transfer.tiers import fs
from pdserve.transfer.tiers.base import ChunkRecord
root, when = Path(sys.argv[1]), sys.argv[2]
record = msgspec.msgpack.decode(sys.stdin.buffer.read(int(sys.argv[3])), type=ChunkRecord)
data = np.frombuffer(sys.stdin.buffer.read(), np.uint8)
n = record.shard_bytes
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if when == "writing":
    real, fs._PIECE = fs._write_all, 1000
    fs._write_all = lambda fd, data: (real(fd, data), len(data) < 4096 and die())
else:
    os.fsync = die
tier = fs.FsTier(fs.FsOptions(root=str(root), min_free=0.0))
tier.put(record, [data[i * n : (i + 1) * n] for i in range(len(record.digests))], time.monotonic() + 20)
"""


def make(root: Path, **options) -> FsTier:
    return FsTier(FsOptions(**{"root": str(root), "min_free": 0.0, "timeout": 20.0, **options}))


class Fs(Subject):
    def __init__(self, root: Path):
        self.root = root
        self.breaks = 0

    def open(self):
        return make(self.root)

    def break_put(self, tier, record, payload):
        self.breaks += 1
        head = envelope.msgspec.msgpack.encode(record)
        done = subprocess.run(
            [
                sys.executable,
                "-P",
                "-c",
                KILLED_WRITER,
                self.root,
                ["writing", "syncing"][self.breaks % 2],
                str(len(head)),
            ],
            input=head + b"".join(part.tobytes() for part in payload),
            timeout=60,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL

    def flip(self, record, position):
        path = self.root / record.key.hex()[:2] / f"{record.key.hex()}.chunk"
        data = bytearray(path.read_bytes())
        data[len(envelope.header(record)) + position] ^= 0x40
        path.write_bytes(data)

    @contextmanager
    def stalled(self, tier):
        """Every job hangs before its first system call, as it does on a hard mount whose server is away."""
        real, answering = fs._mapped, threading.Event()

        @contextmanager
        def hang():
            answering.wait(60)
            with real():
                yield

        fs._mapped = hang
        tier._timeout = 0.5
        try:
            yield
        finally:
            fs._mapped = real
            tier._timeout = 20.0
            answering.set()


@pytest.fixture
def tier(tmp_path):
    made = make(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("rule", conformance.RULES, ids=conformance.name_of)
def test_conformance(rule, tmp_path):
    rule(Fs(tmp_path))


def files(root: Path) -> list[Path]:
    return [p for p in root.rglob("*") if p.is_file()]


def test_a_read_that_hangs_in_the_kernel_costs_the_deadline(tier):
    record, payload = make_chunk(5000)
    tier.put(record, payload, soon())
    path = tier.path(record.key)
    path.unlink()
    os.mkfifo(path)  # opening it blocks until somebody writes
    with pytest.raises(TierError, match="deadline"):
        tier.get(record, payload, time.monotonic() + 0.1)
    os.close(os.open(path, os.O_WRONLY))


def test_every_single_flip_in_the_header_is_a_miss(tier):
    record, payload = make_chunk(100, 2)
    tier.put(record, payload, soon())
    path = tier.path(record.key)
    good = path.read_bytes()
    for position in range(envelope.header_bytes(good, 1)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        path.write_bytes(bad)
        assert tier.contains([record.key]) == [None]
        assert read(tier, record) is None
    # and it can be written again
    assert tier.put(record, payload, soon())
    assert read(tier, record) is not None


def test_a_file_cut_short_is_removed(tier):
    record, payload = make_chunk(9000)
    tier.put(record, payload, soon())
    os.truncate(tier.path(record.key), 6000)
    with pytest.raises(CorruptChunk):
        read(tier, record)
    assert tier.contains([record.key]) == [None]


def test_a_full_file_system_refuses_and_leaves_nothing(tier, tmp_path, monkeypatch):
    def full(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    record, payload = make_chunk(9000)
    with monkeypatch.context() as m:
        m.setattr(fs, "_write_all", full)
        assert tier.put(record, payload, soon()) is False
        assert "full" in tier.stats()["state"]
    assert files(tmp_path) == []
    assert tier.put(record, payload, soon()) is True
    assert tier.stats()["state"] == "ok"


def test_space_is_left_to_others(tmp_path):
    tier = make(tmp_path, min_free=1.0)
    record, payload = make_chunk(9000)
    assert tier.put(record, payload, soon()) is False
    tier.close()


def test_an_io_error_is_a_tier_error_and_leaves_nothing(tier, tmp_path, monkeypatch):
    def broken(fd):
        raise OSError(errno.EIO, "Input/output error")

    record, payload = make_chunk(9000)
    monkeypatch.setattr(fs.os, "fsync", broken)
    with pytest.raises(TierError, match="Input/output"):
        tier.put(record, payload, soon())
    assert files(tmp_path) == []


def test_what_nobody_uses_goes_and_what_is_read_stays(tmp_path, monkeypatch):
    tier = make(tmp_path, ttl=1000.0)
    (old, payload), (used, used_payload) = make_chunk(100), make_chunk(100)
    for record, data in ((old, payload), (used, used_payload)):
        tier.put(record, data, soon())
        os.utime(tier.path(record.key), (0, 0))
    left = tier.path(old.key).parent / ".dead.chunk.tmp"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    assert read(tier, used) is not None
    for folder in {tier.path(r.key).parent.name for r in (old, used)}:
        monkeypatch.setattr(fs.secrets, "randbelow", lambda _, f=folder: int(f, 16))
        tier._sweep(None)
    assert [r is not None for r in tier.contains([old.key, used.key])] == [False, True]
    assert not left.exists()
    tier.close()


def test_the_same_bytes_are_not_written_twice(tier):
    record, payload = make_chunk(9000)
    tier.put(record, payload, soon())
    before = tier.path(record.key).stat().st_ino
    tier.put(record, payload, soon())
    assert tier.path(record.key).stat().st_ino == before


def test_a_chunk_larger_than_a_piece(tier, monkeypatch):
    monkeypatch.setattr(fs, "_PIECE", 4096)
    record, payload = make_chunk(30_001, 2)
    assert tier.put(record, payload, soon())
    assert all(np.array_equal(a, b) for a, b in zip(read(tier, record), payload, strict=True))

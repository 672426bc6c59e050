"""Coverage-guided fuzzing (atheris) of what comes from outside: the wire protocol, segment files, the journal.

    python tests/transfer/fuzz.py wire|segment|journal [--seconds 120]
    python tests/transfer/fuzz.py seeds            writes tests/transfer/seeds anew

Each target must neither crash nor hang, nor build more than its bound from any bytes at all; what it accepts must be sound.
The seeds also run in the ordinary tests (test_fuzz.py), where hypothesis does the rest. An input that fails is written to
the folder that is named, and belongs among the seeds once the fault is mended.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

from pdserve.errors import ProtocolError
from pdserve.transfer import journal, telling, wire
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.tiers import segments
from pdserve.transfer.tiers.base import ChunkRecord

SEEDS = Path(__file__).parent / "seeds"
KEY = bytes(range(32))


# ---- targets ----


def wire_target(data: bytes) -> None:
    """As both sides read: first byte is how the stream is cut, the rest is the stream."""
    step = 1 + (data[0] if data else 0)
    for decode in (wire.decode_request, wire.decode_reply):
        reader = wire.FrameReader()
        try:
            for at in range(1, len(data), step):
                for frame in reader.feed(data[at : at + step]):
                    assert len(frame) <= wire.MAX_FRAME
                    message = decode(frame)
                    assert decode(wire.encode(message)[4:]) == message  # type: ignore[arg-type]
        except ProtocolError:
            pass  # refused in words, which is what is wanted
        assert len(reader._buffer) <= len(data)


def segment_target(data: bytes) -> None:
    """Even first byte: the rest is a segment as it is. Odd: the rest is what a header says, with the right checksum, so
    that what lies behind the checksum is reached too."""
    kind, rest = (data[0] if data else 0), data[1:]
    if kind % 2:
        body = rest[: segments.MAX_HEADER - 100]
        rest = segments._page(segments._DEAD if kind & 2 else segments._LIVE, body) + bytes(PAGE)
        segments.read_first_page(segments._page(segments._SEGMENT, body))
    name = segments.SegmentName(segments.DISK_FORMAT, 1, 0.0)
    whole = segments.first_page(name) + rest
    with tempfile.TemporaryFile() as f:
        f.write(whole)
        f.flush()
        *found, end = segments.scan(f.fileno(), 1, PAGE, len(whole))
    assert isinstance(end, int)
    last = PAGE
    for item in found:
        assert isinstance(item, segments.Scanned)
        assert last <= item.place.offset < item.place.end <= len(whole)
        assert 1 <= len(item.place.record.digests) <= wire.MAX_SHARDS
        last = item.place.end
    assert end == last <= max(PAGE, len(whole))


def journal_target(data: bytes) -> None:
    """Even first byte: a journal as it is. Odd: the rest is one entry, framed with the right checksum."""
    kind, rest = (data[0] if data else 0), data[1:]
    if kind % 2:
        rest = len(rest).to_bytes(4, "little") + journal.zlib.crc32(rest).to_bytes(4, "little") + rest
    for entry in journal._entries(rest):
        if isinstance(entry, journal._Came):
            assert len(entry.key) == 32
            assert 1 <= len(entry.digests) <= wire.MAX_SHARDS
            journal._record(entry)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "wire": wire_target,
    "segment": segment_target,
    "journal": journal_target,
}


# ---- seeds ----


def make_seeds() -> dict[str, list[bytes]]:
    requests: list[wire.Request] = [
        wire.Hello(wire.VERSION, "n", 1),
        wire.Lookup(1, [KEY] * 3),
        wire.Reserve(2, "w", [wire.ReserveItem(KEY, b"", 0, 2, 4096, 256)]),
        wire.Commit(3, [wire.CommitItem(1, 2**64 - 1, [5])]),
        wire.Abort(4, [1, 2]),
        wire.Release(5, 1, 2, 3, [KEY]),
        wire.Ping(6),
        wire.Prefetch(7, [KEY]),
        wire.Push(8, "host", [KEY]),
        wire.Facts([telling.Began("cmpl-r-0-0123abcd", 1.0, {"gpu": 0, "dram": 256}, 1.5, -2.0), telling.Ended("r", 1, "stop")]),
    ]
    replies: list[wire.Reply] = [
        wire.Welcome(wire.VERSION, "d", "/dev/shm/x", 1 << 20, 256),
        wire.LookupReply(1, 9, [wire.Found(0, 256, 4096, 4096, [1])], 1, 2),
        wire.ReserveReply(2, [wire.Grant(wire.GRANTED, 1, 4096), wire.Grant(wire.FULL)]),
        wire.Ok(3, 1),
        wire.Refused(4, "no"),
    ]
    streams = [wire.encode(m) for m in [*requests, *replies]]
    odd = [b"\xff\xff\xff\xff", b"\x06\x00\x00\x00\xdd\xff\xff\xff\xff\xc0", b"\x05\x00\x00\x00\x94\x01\x00\xa1\x80"]
    record = ChunkRecord(1, KEY, b"", 256, PAGE, [1], b"t")
    live, dead = (segments.header(1, PAGE, record, live=live) for live in (True, False))
    body = segments._open_page(live)
    assert body is not None
    head = journal._frame(journal._Head(journal.FORMAT, 1 << 20, 0.0))
    came = journal._frame(journal._Came(KEY, b"", 0, 1, 256, PAGE, [1], b"t"))
    went = journal._frame(journal._Went(KEY))
    return {
        "wire": [b"\x40" + s for s in [*streams, *odd]] + [b"\x00" + b"".join(streams)],
        "segment": [
            b"\0" + live + bytes(PAGE),
            b"\0" + dead + bytes(PAGE) + live,
            b"\0" + live,
            b"\1" + body[1],
            b"\3" + body[1],
        ],
        "journal": [b"\0" + head + came + went, b"\0" + head + came[:-1], *(b"\1" + e[8:] for e in (head, came, went))],
    }


def write_seeds() -> None:
    for name, inputs in make_seeds().items():
        (SEEDS / name).mkdir(parents=True, exist_ok=True)
        for i, data in enumerate(inputs):
            (SEEDS / name / f"{i:02d}").write_bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", choices=[*TARGETS, "seeds"])
    parser.add_argument("--seconds", type=int, default=120)
    args = parser.parse_args()
    if args.target == "seeds":
        write_seeds()
        return
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed (it exists for Linux on x86-64): pip install atheris")
    for module in (wire, segments, journal):
        for owner in (
            module,
            *(c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__),
        ):
            for name, thing in list(vars(owner).items()):
                if isinstance(thing, FunctionType) and thing.__module__ == module.__name__:
                    setattr(owner, name, atheris.instrument_func(thing))
    work = tempfile.mkdtemp(prefix=f"fuzz-{args.target}-")
    print(f"what fails is written to {work}")
    words = [
        sys.argv[0],
        work,
        str(SEEDS / args.target),
        f"-artifact_prefix={work}/",
        f"-max_total_time={args.seconds}",
    ]
    atheris.Setup([*words, "-timeout=10", "-rss_limit_mb=1024", "-max_len=70000"], TARGETS[args.target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""Bytes from outside: whatever a socket, a segment or the arena may hold, nothing crashes, hangs or is believed."""

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdserve.errors import ProtocolError
from pdserve.transfer import wire
from pdserve.transfer.allocator import PAGE
from pdserve.transfer.tiers import segments
from pdserve.transfer.tiers.base import ChunkRecord

from . import fuzz

KEY = bytes(range(32))
SEEDS = [
    wire.Hello(wire.VERSION, "n", 1),
    wire.Lookup(1, [KEY] * 3),
    wire.Reserve(2, "w", [wire.ReserveItem(KEY, b"", 0, 2, 4096, 256)]),
    wire.Commit(3, [wire.CommitItem(1, 2**64 - 1)]),
    wire.Abort(4, [1, 2]),
    wire.Release(5, 1, 2, 3, [KEY]),
    wire.Ping(6),
    wire.Prefetch(7, [bytes(32)]),
]
FRAMES = [wire.encode(m) for m in SEEDS]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.one_of(st.binary(max_size=200), st.sampled_from(FRAMES)), max_size=6),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
    st.integers(1, 64),
)
@example([b"\xff\xff\xff\xff"], [], 1)
@example([b"\x06\x00\x00\x00\xdd\xff\xff\xff\xff\xc0"], [], 64)  # an array said to have 2**32 elements
@example([b"\x05\x00\x00\x00\x94\x01\x00\xa1\x80"], [], 1)  # a name that is not UTF-8
def test_any_stream_of_bytes_is_messages_or_a_refusal(parts, changes, step):
    data = bytearray(b"".join(parts))
    for at, value in changes:
        if data:
            data[at % len(data)] = value
    reader = wire.FrameReader()
    try:
        for at in range(0, len(data), step):
            for frame in reader.feed(bytes(data[at : at + step])):
                message = wire.decode_request(frame)
                assert len(frame) <= wire.MAX_FRAME
                assert wire.encode(message)
    except ProtocolError:
        return
    assert len(reader._buffer) <= len(data)


def _segment(records):
    name = segments.SegmentName(segments.DISK_FORMAT, 1, 0.0)
    data = bytearray(segments.first_page(name))
    for i, pages in enumerate(records):
        record = ChunkRecord(1, bytes([i]) * 32, b"", 256, pages * PAGE, [i], b"")
        data += segments.header(1, len(data), record)
        data += bytes([i + 1]) * (pages * PAGE)
    return data


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 4), max_size=5),
    st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=30)), max_size=5),
    st.integers(0, 3 * PAGE),
    st.binary(max_size=50),
)
def test_any_segment_is_read_to_its_end_and_only_sound_headers_count(tmp_path_factory, records, changes, cut, junk):
    data = _segment(records)
    for at, new in changes:
        at %= len(data)
        data[at : at + len(new)] = new
    data = data[: max(0, len(data) - cut)] + junk
    path = tmp_path_factory.getbasetemp() / "fuzz.seg"
    path.write_bytes(data)
    with path.open("rb") as f:
        *found, end = segments.scan(f.fileno(), 1, PAGE, len(data))
    assert isinstance(end, int)
    assert PAGE <= end <= max(PAGE, len(data))
    last = PAGE
    for item in found:
        assert last <= item.place.offset < item.place.end <= len(data)
        last = item.place.end
        head = data[item.place.offset : item.place.offset + item.place.header_bytes]
        again = segments.read_header(bytes(head), 1, item.place.offset)
        assert again is not None
        assert again[0] == item.place
    assert end == last


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=2 * PAGE))
def test_any_page_is_a_header_or_none(data):
    segments.read_header(data, 1, PAGE)
    segments.read_first_page(data)


def test_a_header_elsewhere_is_not_taken():
    record = ChunkRecord(1, KEY, b"", 256, PAGE, [1], b"")
    page = segments.header(7, 5 * PAGE, record)
    assert segments.read_header(page, 7, 5 * PAGE) is not None
    assert segments.read_header(page, 8, 5 * PAGE) is None
    assert segments.read_header(page, 7, 6 * PAGE) is None


def test_flips_in_the_arena_are_never_answered(tmp_path):
    """The bytes change under a stopped daemon: what the next one finds is right, the rest is a miss."""
    import asyncio
    import os

    from pdserve import kernels
    from pdserve.transfer import arena, journal
    from pdserve.transfer.daemon import Daemon

    name, rng, flips, missed = f"flip-{os.getpid()}", np.random.default_rng(), 0, 0
    contents = {i: rng.integers(0, 256, PAGE + 16, dtype=np.uint8) for i in range(180)}

    async def fill():
        d = Daemon(name=name, size=400 * PAGE, chunk_tokens=256)
        items = [wire.ReserveItem(bytes([i]) * 32, b"", 0, 1, PAGE + 16, 256) for i in contents]
        grants = d.answer(wire.Reserve(1, "w", items), 1).grants
        for i, g in enumerate(grants):
            d.arena.bytes[g.offset : g.offset + PAGE + 16] = contents[i]
        d.answer(
            wire.Commit(2, [wire.CommitItem(g.reservation, kernels.digest(contents[i])) for i, g in enumerate(grants)]),
            1,
        )
        d.journal.close(keep=True)
        d.tiering.close(1)

    async def look():
        d = Daemon(name=name, size=400 * PAGE, chunk_tokens=256)
        d.loop = asyncio.get_running_loop()
        d.recover()
        ends = time.monotonic() + 90
        while d.tiering.recovering:
            assert time.monotonic() < ends
            await asyncio.sleep(0.001)
        found = 0
        for i in contents:
            reply = d.answer(wire.Lookup(1, [bytes([i]) * 32]), 1)
            for f in reply.found:
                found += 1
                assert (d.arena.bytes[f.offset : f.offset + PAGE + 16] == contents[i]).all()
        assert d.store.stats()["used_bytes"] == found * 2 * PAGE
        d.close()
        return found

    try:
        while flips < 10_000:
            asyncio.run(fill())
            for path, count in (
                (arena.path_for(name), 200),
                (journal.path_for(arena.path_for(name)), int(rng.integers(3))),
            ):
                with path.open("r+b") as f:
                    for _ in range(count):
                        at = int(rng.integers(path.stat().st_size))
                        f.seek(at)
                        (byte,) = f.read(1)
                        f.seek(at)
                        f.write(bytes([byte ^ (1 << int(rng.integers(8)))]))
                        flips += 1
            missed += 180 - asyncio.run(look())
    finally:
        arena.path_for(name).unlink(missing_ok=True)
        journal.path_for(arena.path_for(name)).unlink(missing_ok=True)
    assert missed


INPUTS = [(target, seed) for target in fuzz.TARGETS for seed in sorted((fuzz.SEEDS / target).iterdir())]


@pytest.mark.parametrize(("target", "seed"), INPUTS, ids=[f"{t}-{s.name}" for t, s in INPUTS])
def test_the_fuzzers_seeds_and_past_findings(target, seed):
    fuzz.TARGETS[target](seed.read_bytes())


def test_the_seeds_are_of_the_present_version():
    """`python tests/transfer/fuzz.py seeds` writes them anew."""
    kept = {t: {s.read_bytes() for s in (fuzz.SEEDS / t).iterdir()} for t in fuzz.TARGETS}
    assert {t: set(inputs) - kept[t] for t, inputs in fuzz.make_seeds().items()} == {t: set() for t in fuzz.TARGETS}
    accepted = [wire.decode_request(data[5:]) for data in fuzz.make_seeds()["wire"][:9]]
    assert len({type(m) for m in accepted}) == 9

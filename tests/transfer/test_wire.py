import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.errors import ProtocolError
from pdserve.transfer import wire

keys = st.lists(st.binary(min_size=32, max_size=32), max_size=20)
ids = st.integers(0, 2**63 - 1)
items = st.builds(
    lambda k, p, s, extra, b, t: wire.ReserveItem(k, p, s, s + 1 + extra, b, t),
    st.binary(min_size=32, max_size=32),
    st.sampled_from([b"", b"p" * 32]),
    st.integers(0, 7),
    st.integers(0, 7),
    st.integers(1, 2**40),
    st.integers(1, 2**24),
)
requests = st.one_of(
    st.builds(wire.Hello, st.integers(0, 9), st.text(max_size=200), st.integers(0, 2**31)),
    st.builds(wire.Lookup, ids, keys),
    st.builds(wire.Reserve, ids, st.text(max_size=200), st.lists(items, max_size=5)),
    st.builds(wire.Commit, ids, st.lists(st.builds(wire.CommitItem, ids, st.integers(0, 2**64 - 1)), max_size=5)),
    st.builds(wire.Abort, ids, st.lists(ids, max_size=5)),
    st.builds(wire.Release, ids, ids, st.integers(0, 9), st.integers(0, 2**40), keys),
    st.builds(wire.Ping, ids),
    st.builds(wire.Prefetch, ids, keys),
)


@given(st.lists(requests, max_size=6), st.data())
def test_messages_survive_any_cutting_of_the_stream(messages, data):
    stream = b"".join(wire.encode(m) for m in messages)
    reader, got, at = wire.FrameReader(), [], 0
    while at < len(stream):
        n = data.draw(st.integers(1, len(stream) - at))
        got += [wire.decode_request(f) for f in reader.feed(stream[at : at + n])]
        at += n
    assert got == messages


@given(st.binary(max_size=300))
def test_garbage_is_refused_in_words_and_never_otherwise(data):
    reader = wire.FrameReader()
    with contextlib.suppress(ProtocolError):  # any other error is a crash of the daemon
        for frame in reader.feed(data):
            wire.decode_request(frame)


def test_a_length_over_the_bound_is_refused_before_its_bytes_are_awaited():
    with pytest.raises(ProtocolError, match="over the bound"):
        wire.FrameReader().feed((wire.MAX_FRAME + 1).to_bytes(4, "little"))


@pytest.mark.parametrize(
    "bad",
    [
        wire.Lookup(1, [b"short"]),
        wire.Lookup(-1, []),
        wire.Hello(1, "x" * 201, 1),
        wire.Abort(1, [-5]),
    ],
)
def test_out_of_bounds_fields_are_refused(bad):
    with pytest.raises(ProtocolError, match="not a request"):
        wire.decode_request(wire.encode(bad)[4:])


def test_a_shard_beyond_the_count_cannot_be_built():
    with pytest.raises(ValueError, match="shard 2 of 2"):
        wire.ReserveItem(b"k" * 32, b"", 2, 2, 1, 1)


def test_a_lookup_of_a_100k_token_prompt_is_one_small_frame():
    assert len(wire.encode(wire.Lookup(1, [bytes(32)] * 400))) < 16384

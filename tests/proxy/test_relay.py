from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pdserve.proxy.relay import EVENT_LIMIT, EventCutter

EVENTS = st.lists(
    st.sampled_from([b"data: {}\n\n", b"event: x\ndata: 1\n\n", b"data: a\r\n\r\n", b": hi\n\n", b"data: [DONE]\n\n"])
)


@given(EVENTS, st.binary(max_size=5).filter(lambda b: b"\n" not in b), st.lists(st.integers(0, 200)))
def test_every_byte_passes_in_whole_events(events: list[bytes], rest: bytes, cuts: list[int]) -> None:
    text = b"".join(events) + rest
    at = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    cutter, out = EventCutter(), b""
    for a, b in pairwise(at):
        piece = cutter.feed(text[a:b])
        assert not piece or piece.endswith((b"\n\n", b"\r\n\r\n"))
        out += piece
    assert out + cutter.rest == text
    assert cutter.rest == rest


def test_an_event_leaves_as_soon_as_it_is_whole() -> None:
    cutter = EventCutter()
    assert cutter.feed(b"data: 1\n\n") == b"data: 1\n\n"
    assert cutter.feed(b"data: 2\n") == b""
    assert cutter.feed(b"\ndata: 3") == b"data: 2\n\n"
    assert cutter.rest == b"data: 3"


def test_done_is_seen_only_as_an_event_of_its_own() -> None:
    for text, done in [
        (b"data: [DONE]\n\n", True),
        (b"data: {}\n\ndata: [DONE]\r\n\r\n", True),
        (b'data: {"text":"data: [DONE]"}\n\n', False),
        (b"data: [DONE]\n\ndata: {}\n\n", False),
        (b"data: {}\n\n", False),
    ]:
        cutter = EventCutter()
        cutter.feed(text)
        assert cutter.done is done, text


def test_what_never_ends_is_not_kept_for_ever() -> None:
    cutter, piece, out = EventCutter(), b"x" * (1024 * 1024), 0
    for _ in range(12):
        out += len(cutter.feed(piece))
        assert len(cutter.rest) <= EVENT_LIMIT
    assert out > 0

"""Stores give way to loads, both to answers, and always go on."""

import threading
import time

import pytest

from pdserve.engines.vllm import giving_way
from pdserve.engines.vllm.giving_way import LOAD_SHARE, PIECE_BYTES, SEVERAL, TOGETHER, GivingWay
from pdserve.errors import ConfigError

CHUNKS = list(range(19))


def nobody() -> bool:
    return False


def turns(way: GivingWay, chunks: list[int], together: int = 8, others_wait=nobody):
    """What is stored together."""
    return (some for some, _ in way.stores(chunks, together, others_wait))


def test_as_many_together_as_is_right():
    way = GivingWay()
    assert [len(x) for x in turns(way, CHUNKS)] == [8, 8, 3]
    way.loading(True)
    assert [len(x) for x in turns(way, CHUNKS)] == [8, 8, 3], "nobody decodes"
    way.loading(False)
    way.answers = 1
    assert {len(x) for x in turns(way, CHUNKS[:-1])} == {TOGETHER}
    assert [len(x) for x in turns(way, CHUNKS[:3], 1)] == [1, 1, 1]
    assert list(turns(way, [])) == []


def test_in_small_pieces_while_answers_are_generated():
    way = GivingWay()
    storing = way.stores(CHUNKS, 2, nobody)
    assert next(storing)[1] == 0
    way.answers = 1
    assert next(storing)[1] == PIECE_BYTES


def test_beside_a_load_one_at_a_time_and_all_of_them(monkeypatch):
    steps: list[object] = []
    monkeypatch.setattr(giving_way, "PAUSE_S", 0.0)
    way = GivingWay()
    pause = way._pause
    monkeypatch.setattr(way, "_pause", lambda: (pause(), steps.append("pause")))
    way.answers = 1
    way.loading(True)
    for some in turns(way, CHUNKS[:3]):
        steps.append(some)
    assert steps == [[0], "pause", [1], "pause", [2]], "none after the last"


def test_no_pause_where_other_stores_wait(monkeypatch):
    way = GivingWay()
    pauses: list[int] = []
    monkeypatch.setattr(way, "_pause", lambda: pauses.append(1))
    way.answers = 1
    way.loading(True)
    waiting = iter([True, True, False])
    assert list(turns(way, CHUNKS[:4], 8, lambda: next(waiting))) == [[0], [1], [2], [3]]
    assert len(pauses) == 1


def test_the_pause_ends_with_the_load(monkeypatch):
    monkeypatch.setattr(giving_way, "PAUSE_S", 30.0)
    way = GivingWay()
    way.answers = 1
    way.loading(True)
    found: list[list[int]] = []
    storing = threading.Thread(target=lambda: found.extend(list(x) for x in turns(way, CHUNKS[:5])), daemon=True)
    storing.start()
    end = time.monotonic() + 10
    while not found and time.monotonic() < end:
        time.sleep(0.001)
    way.loading(False)
    storing.join(10)
    assert not storing.is_alive()
    assert found == [[0], [1, 2], [3, 4]]


def test_a_load_has_its_share_while_answers_are_generated():
    way = GivingWay(0.5)
    loads = lambda others=nobody: [(len(some), share) for some, share in way.loads(CHUNKS, 8, others)]  # noqa: E731
    assert loads() == [(1, 100), (8, 100), (8, 100), (2, 100)], "nobody decodes"
    way.answers = SEVERAL
    assert loads() == [(1, 50), *[(TOGETHER, 50)] * 9]
    assert loads(lambda: True) == [(1, 100), (8, 100), (8, 100), (2, 100)], "others wait"
    way.answers = SEVERAL - 1
    assert loads() == [(1, 100), (8, 100), (8, 100), (2, 100)], "few answers feel it"
    way.answers = SEVERAL
    begun = way.loads(CHUNKS, 8, nobody)
    assert [len(next(begun)[0]) for _ in range(2)] == [1, TOGETHER]
    way.answers = 0
    assert [x for some, _ in begun for x in some] == CHUNKS[1 + TOGETHER :], "all of them, whatever changes meanwhile"
    assert list(GivingWay().loads([], 8, nobody)) == []


@pytest.mark.parametrize(("share", "percent"), [(1.0, 100), (0.8, 80), (0.1, 10), (None, round(100 * LOAD_SHARE))])
def test_the_share_that_was_asked_for(share, percent):
    way = GivingWay(share)
    way.answers = SEVERAL
    assert {p for _, p in way.loads(CHUNKS, 8, nobody)} == {percent}


def test_what_is_no_share():
    assert [giving_way.load_share(x) for x in (None, 1, 0.25)] == [None, 1.0, 0.25]
    for wrong in (0, 1.5, "0.5", True, float("nan")):
        with pytest.raises(ConfigError, match=r"pdserve.load_share: .* is no share of the bus"):
            giving_way.load_share(wrong)

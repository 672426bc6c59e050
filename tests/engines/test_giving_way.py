"""Stores give way to loads, and always go on."""

import threading
import time

from pdserve.engines.vllm import giving_way
from pdserve.engines.vllm.giving_way import TOGETHER, GivingWay

CHUNKS = list(range(19))


def nobody() -> bool:
    return False


def turns(way: GivingWay, chunks: list[int]):
    return way.turns(chunks, 8, nobody)


def test_as_many_together_as_is_right():
    way = GivingWay()
    assert [len(x) for x in turns(way, CHUNKS)] == [8, 8, 3]
    way.loading(True)
    assert [len(x) for x in turns(way, CHUNKS)] == [8, 8, 3], "nobody decodes"
    way.loading(False)
    way.decoding = True
    assert {len(x) for x in turns(way, CHUNKS[:-1])} == {TOGETHER}
    assert [len(x) for x in way.turns(CHUNKS[:3], 1, nobody)] == [1, 1, 1]
    assert list(turns(way, [])) == []


def test_beside_a_load_one_at_a_time_and_all_of_them(monkeypatch):
    steps: list[object] = []
    monkeypatch.setattr(giving_way, "PAUSE_S", 0.0)
    way = GivingWay()
    pause = way._pause
    monkeypatch.setattr(way, "_pause", lambda: (pause(), steps.append("pause")))
    way.decoding = True
    way.loading(True)
    for some in turns(way, CHUNKS[:3]):
        steps.append(some)
    assert steps == [[0], "pause", [1], "pause", [2]], "none after the last"


def test_no_pause_where_other_stores_wait(monkeypatch):
    way = GivingWay()
    pauses: list[int] = []
    monkeypatch.setattr(way, "_pause", lambda: pauses.append(1))
    way.decoding = True
    way.loading(True)
    waiting = iter([True, True, False])
    assert list(way.turns(CHUNKS[:4], 8, lambda: next(waiting))) == [[0], [1], [2], [3]]
    assert len(pauses) == 1


def test_the_pause_ends_with_the_load(monkeypatch):
    monkeypatch.setattr(giving_way, "PAUSE_S", 30.0)
    way = GivingWay()
    way.decoding = True
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

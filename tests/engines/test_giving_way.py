"""Stores give way to loads, and always go on."""

import threading
import time

from pdserve.engines.vllm import giving_way
from pdserve.engines.vllm.giving_way import TOGETHER, GivingWay

CHUNKS = list(range(19))


def test_as_many_together_as_is_right():
    way = GivingWay()
    assert [len(x) for x in way.turns(CHUNKS, 8)] == [8, 8, 3]
    way.loading(True)
    assert [len(x) for x in way.turns(CHUNKS, 8)] == [8, 8, 3], "nobody decodes"
    way.loading(False)
    way.decoding = True
    assert {len(x) for x in way.turns(CHUNKS[:-1], 8)} == {TOGETHER}
    assert [len(x) for x in way.turns(CHUNKS[:3], 1)] == [1, 1, 1]
    assert list(way.turns([], 8)) == []


def test_beside_a_load_one_at_a_time_and_all_of_them(monkeypatch):
    steps: list[object] = []
    monkeypatch.setattr(giving_way, "PAUSE_S", 0.0)
    way = GivingWay()
    pause = way._pause
    monkeypatch.setattr(way, "_pause", lambda: (pause(), steps.append("pause")))
    way.decoding = True
    way.loading(True)
    for some in way.turns(CHUNKS[:3], 8):
        steps.append(some)
    assert steps == [[0], "pause", [1], "pause", [2]], "none after the last"


def test_the_pause_ends_with_the_load(monkeypatch):
    monkeypatch.setattr(giving_way, "PAUSE_S", 30.0)
    way = GivingWay()
    way.decoding = True
    way.loading(True)
    found: list[list[int]] = []
    storing = threading.Thread(target=lambda: found.extend(list(x) for x in way.turns(CHUNKS[:5], 8)), daemon=True)
    storing.start()
    end = time.monotonic() + 10
    while not found and time.monotonic() < end:
        time.sleep(0.001)
    way.loading(False)
    storing.join(10)
    assert not storing.is_alive()
    assert found == [[0], [1, 2], [3, 4]]

"""Who listens at the daemon hears at once, is bounded, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json

import pytest

from pdserve.transfer import began, telling
from pdserve.transfer.began import Listeners
from pdserve.transfer.gone import Gone
from pdserve.transfer.requests import Requests

pytestmark = pytest.mark.anyio
TOLD = telling.Began("cmpl-r-0-0123abcd", 1.0, {"gpu": 0, "dram": 256}, 2.5, -1.0)


async def test_what_an_engine_tells_is_heard_by_the_clients_id() -> None:
    requests = Requests(Gone(), lambda: [], 0.0)
    stream = requests.listeners.stream()
    assert await anext(stream) == b"\n"
    requests.take(telling.Facts([TOLD]), "both-0")
    line = json.loads(await anext(stream))
    assert (line["request"], line["instance"], line["cached"]) == ("r", "both-0", {"gpu": 0, "dram": 256})
    assert (line["load_ms"], line["saved_ms"]) == (2.5, -1.0)
    assert len(requests) == 0  # nothing of it is kept
    await stream.aclose()
    assert len(requests.listeners) == 0


async def test_one_that_does_not_read_misses_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(began, "MOST_WAITING", 10)
    listeners = Listeners()
    stream = listeners.stream()
    await anext(stream)
    for _ in range(100):
        listeners.tell("r", "both-0", TOLD)
    assert (await anext(stream)).count(b"\n") == 10
    await stream.aclose()


async def test_silence_is_broken_and_the_end_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(began, "STILL_THERE_S", 0.01)
    listeners = Listeners()
    stream = listeners.stream()
    assert [await anext(stream), await anext(stream)] == [b"\n", b"\n"]
    monkeypatch.setattr(began, "STILL_THERE_S", 600.0)
    end = asyncio.create_task(anext(stream, b"over"))
    await asyncio.sleep(0)
    listeners.close()
    async with asyncio.timeout(60):
        assert await end == b"over"
    assert len(listeners) == 0

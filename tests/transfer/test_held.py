"""What a daemon tells of the prompts in its memory: what changed, in order, and everything after a gap or a restart."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from pdserve.transfer import held
from pdserve.transfer.held import Held

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Cache:
    """A set of keys, and what is told of it."""

    def __init__(self, life: str = "a") -> None:
        self.keys: set[bytes] = set()
        self.held = Held(life, self.keys.__contains__)

    def put(self, *keys: bytes) -> None:
        for key in keys:
            self.keys.add(key)
            self.held.came(key)

    def drop(self, *keys: bytes, in_turn: bool = True) -> None:
        for key in keys:
            self.keys.discard(key)
            self.held.went(key, in_turn)

    def told(self) -> dict[str, tuple[int, int]]:
        return self.held.all().held


def keys(name: str, count: int = 4) -> list[bytes]:
    return [f"{name}{n}".encode() for n in range(count)]


class Listener:
    def __init__(self, cache: Cache, life: str = "", seq: int = 0) -> None:
        self._stream = cache.held.stream(life, seq)
        self._rest: list[tuple[str, Any]] = []

    async def next(self) -> tuple[str, Any]:
        async with asyncio.timeout(30):
            while not self._rest:
                for event in (await anext(self._stream)).decode().split("\n\n"):
                    if event and not event.startswith(":"):
                        _, kind, data = event.split("\n")
                        self._rest.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        return self._rest.pop(0)

    async def close(self) -> None:
        await self._stream.aclose()  # type: ignore[attr-defined]


async def test_changes_are_told_in_order() -> None:
    cache = Cache()
    listener = Listener(cache)
    assert await listener.next() == ("all", {"daemon_id": "a", "seq": 0, "held": {}})
    one, two, three, four = keys("p")
    said = []
    for change in (
        lambda: cache.held.asked("r", [one, two, three, four], 64, 200),
        lambda: cache.put(one),
        lambda: cache.put(three, two),
        lambda: cache.put(four),
        lambda: cache.drop(four),
    ):
        change()
        said.append(await listener.next())
    assert [kind for kind, _ in said] == ["held"] * 5
    assert [(event["seq"], event["tokens"]) for _, event in said] == [(1, 0), (2, 64), (3, 192), (4, 200), (5, 192)]
    assert {(event["request"], event["of"]) for _, event in said} == {("r", 200)}
    await listener.close()


async def test_what_comes_at_once_is_told_at_once() -> None:
    cache = Cache()
    listener = Listener(cache)
    await listener.next()
    cache.held.asked("r", keys("p", 100), 64, 6400)
    for key in keys("p", 100):
        cache.put(key)
    assert await listener.next() == ("held", {"seq": 1, "request": "r", "tokens": 6400, "of": 6400})
    cache.drop(keys("p", 100)[99])
    cache.put(keys("p", 100)[99])
    cache.held.asked("s", keys("q"), 64, 256)
    assert await listener.next() == ("held", {"seq": 2, "request": "s", "tokens": 0, "of": 256})
    await listener.close()


async def test_what_was_missed_is_told_from_the_number_on() -> None:
    cache = Cache()
    cache.held.asked("r", keys("p"), 64, 256)
    assert cache.told() == {"r": (0, 256)}
    cache.put(*keys("p")[:2])
    listener = Listener(cache, "a", 1)
    assert await listener.next() == ("held", {"seq": 2, "request": "r", "tokens": 128, "of": 256})
    await listener.close()


@pytest.mark.parametrize(("life", "seq"), [("b", 2), ("a", 99), ("", 0)])
async def test_a_listener_of_another_life_is_told_everything(life: str, seq: int) -> None:
    cache = Cache()
    cache.held.asked("r", keys("p"), 64, 256)
    cache.put(*keys("p")[:2])
    listener = Listener(cache, life, seq)
    assert await listener.next() == ("all", {"daemon_id": "a", "seq": 1, "held": {"r": [128, 256]}})
    await listener.close()


async def test_who_falls_behind_is_told_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "MOST_EVENTS", 10)
    cache = Cache()
    listener = Listener(cache)
    await listener.next()
    for n in range(30):
        cache.held.asked(f"r{n}", keys(f"p{n}"), 64, 256)
    kind, everything = await listener.next()
    assert (kind, everything["seq"], len(everything["held"])) == ("all", 30, 30)
    cache.put(keys("p7")[0])
    assert await listener.next() == ("held", {"seq": 31, "request": "r7", "tokens": 64, "of": 256})
    await listener.close()


async def test_what_is_dropped_in_the_middle_is_seen() -> None:
    cache = Cache()
    cache.held.asked("r", keys("p"), 64, 256)
    cache.put(*keys("p"))
    listener = Listener(cache, "a", cache.held.all().seq)
    cache.drop(keys("p")[1], in_turn=False)
    assert (await listener.next())[1]["tokens"] == 64
    cache.put(keys("p")[1])
    assert (await listener.next())[1]["tokens"] == 256
    await listener.close()


async def test_close_ends_every_stream_and_nothing_is_left() -> None:
    cache = Cache()
    streams = [cache.held.stream("", 0) for _ in range(3)]
    for stream in streams:
        await anext(stream)
        await anext(stream)
    cache.held.close()
    async with asyncio.timeout(30):
        assert [[piece async for piece in stream] for stream in streams] == [[], [], []]
    assert not cache.held._listeners


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "MOST_PROMPTS", 5)
    cache = Cache()
    for n in range(40):
        cache.held.asked(f"r{n}", keys(f"p{n}"), 64, 256)
        cache.put(*keys(f"p{n}"))
    assert list(cache.told()) == [f"r{n}" for n in range(35, 40)]
    assert len(cache.held._watching) <= 10
    monkeypatch.setattr(held, "MOST_KEYS", 8)
    cache.held.asked("last", keys("last"), 64, 256)
    assert len(cache.held) == 2
    for name in list(cache.told()):
        cache.held._forget(name)
    assert not cache.held._watching


def test_whatever_comes_and_goes_the_counts_are_right() -> None:
    chance = random.Random(7)
    cache = Cache()
    prompts = {}
    stem = keys("stem", 3)
    for n in range(6):
        prompts[f"r{n}"] = [*stem[: n % 4], *keys(f"own{n}", 3)]
        cache.held.asked(f"r{n}", prompts[f"r{n}"], 10, 10 * len(prompts[f"r{n}"]) - 3)
    every = sorted({key for all_ in prompts.values() for key in all_})
    for _ in range(400):
        key = chance.choice(every)
        if key not in cache.keys:
            cache.put(key)
        else:
            built_on = any(
                key in all_ and any(k in cache.keys for k in all_[all_.index(key) + 1 :]) for all_ in prompts.values()
            )
            cache.drop(key, in_turn=not built_on)
        for name, all_ in prompts.items():
            count = next((n for n, k in enumerate(all_) if k not in cache.keys), len(all_))
            assert cache.told()[name] == (min(10 * count, 10 * len(all_) - 3), 10 * len(all_) - 3)

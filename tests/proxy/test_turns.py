from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from pdserve.proxy.turns import Turns


class Loop:
    """Turn by turn, by hand: what is called soon runs in the next turn."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], Any]] = []

    def call_soon(self, callback: Callable[..., Any], *args: Any) -> None:
        self.soon.append(lambda: callback(*args))

    def turn(self) -> None:
        ready, self.soon = self.soon, []
        for callback in ready:
            callback()

    @property
    def real(self) -> asyncio.AbstractEventLoop:
        return cast(asyncio.AbstractEventLoop, self)


def test_a_few_begin_at_once_and_the_rest_in_order() -> None:
    loop, turns, begun = Loop(), Turns(3), list[int]()
    for n in range(8):
        turns.begin(loop.real, lambda n=n: begun.append(n))  # type: ignore[misc]
    assert begun == [0, 1, 2]
    loop.turn()
    assert begun == [0, 1, 2, 3, 4, 5]
    loop.turn()
    assert begun == list(range(8))


def test_who_comes_later_does_not_pass_the_line() -> None:
    loop, turns, begun = Loop(), Turns(2), list[int]()
    for n in range(6):
        turns.begin(loop.real, lambda n=n: begun.append(n))  # type: ignore[misc]
    loop.turn()  # 2 and 3 take all of this turn
    turns.begin(loop.real, lambda: begun.append(6))
    assert begun == [0, 1, 2, 3]
    while loop.soon:
        loop.turn()
    assert begun == list(range(7))


def test_at_rest_nothing_is_scheduled_and_the_next_begins_at_once() -> None:
    loop, turns, begun = Loop(), Turns(1), list[int]()
    for n in range(3):
        turns.begin(loop.real, lambda: begun.append(n))  # noqa: B023 - called at once
        assert len(begun) == n + 1
        loop.turn()
        assert not loop.soon


def test_one_that_fails_to_begin_does_not_stop_those_behind_it() -> None:
    loop, turns, begun = Loop(), Turns(1), list[int]()

    def fails() -> None:
        raise RuntimeError("made to fail")

    turns.begin(loop.real, lambda: begun.append(0))
    turns.begin(loop.real, fails)
    turns.begin(loop.real, lambda: begun.append(2))
    with pytest.raises(RuntimeError):
        loop.turn()
    loop.turn()
    assert begun == [0, 2]


@pytest.mark.anyio
async def test_a_burst_is_answered_in_full_and_who_leaves_it_leaves_nothing(rig: Any) -> None:
    async with rig() as r:
        body = {"model": "fake", "prompt": "one two three", "max_tokens": 2}
        opened = await asyncio.gather(*(r.open("/v1/completions", body) for _ in range(30)))
        for _, writer in opened[::2]:
            writer.transport.abort()  # some of them in the line, some already begun
        for reader, writer in opened[1::2]:
            assert b" 200 " in await asyncio.wait_for(reader.readline(), 30)
            writer.close()
        await r.settled()

"""The list of peers is asked for on a thread of its own; nothing waits for a source that hangs or fails."""

import asyncio
import threading

import pytest

from pdserve.transfer.peers import follow
from pdserve.transfer.peers.follow import Follower


class Source:
    def __init__(self):
        self.asked, self.closed, self.failing = 0, 0, False
        self.answering = threading.Event()
        self.answering.set()

    def peers(self):
        self.asked += 1
        self.answering.wait(60)
        if self.failing:
            raise ValueError("told to fail")
        return {f"tcp://{self.asked}": ""}

    def close(self):
        self.closed += 1


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(follow, "LIST_EVERY_S", 0.01)


def test_each_answer_is_told_in_the_loop_and_the_entry_taken_away_at_the_end(helpers):
    async def story():
        source, told = Source(), []
        follower = Follower(source, lambda listed: told.append((listed, threading.current_thread())))
        await helpers.until(lambda: len(told) >= 3)
        await follower.stop()
        assert source.closed == 1
        assert {thread for _, thread in told} == {threading.main_thread()}
        assert [listed for listed, _ in told[:3]] == [{"tcp://1": ""}, {"tcp://2": ""}, {"tcp://3": ""}]

    asyncio.run(story())


def test_a_source_that_fails_is_asked_again(helpers):
    async def story():
        source, told = Source(), []
        source.failing = True
        follower = Follower(source, told.append)
        await helpers.until(lambda: source.asked >= 3)
        assert told == []
        source.failing = False
        await helpers.until(lambda: told)
        await follower.stop()

    asyncio.run(story())


def test_the_end_does_not_wait_for_a_source_that_hangs(helpers, monkeypatch):
    monkeypatch.setattr(follow, "CLOSE_S", 0.05)

    async def story():
        source, told = Source(), []
        source.answering.clear()
        follower = Follower(source, told.append)
        await helpers.until(lambda: source.asked == 1)
        await asyncio.sleep(0.1)
        assert source.asked == 1  # never asked twice at once
        await follower.stop()
        assert source.closed == 0
        return source, follower

    source, follower = asyncio.run(story())
    source.answering.set()  # it answers after all, when nobody is there any more
    follower._thread.join(60)
    assert source.closed == 1

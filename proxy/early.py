"""A decode leg that is sent while the prefill is still under way, so that its engine has the prompt's tokens, a place in
its queue, and the first chunks, when the last one comes.

It is used at most once, and split.py, which sends it, drops it in the end: either way its connection is closed, and with it
what its engine does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from pdserve.proxy.instance import Instance
from pdserve.proxy.upstream import Answer, LegFailure


class EarlyLeg:
    """`opened` sends the request when it is entered. A task of its own holds it, since what is entered in one task must be
    left in the same."""

    def __init__(self, instance: Instance, opened: AbstractAsyncContextManager[Answer]) -> None:
        self.instance = instance
        self._opened = opened
        self._answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._done_with = asyncio.Event()
        self._task: asyncio.Task[None] | None = asyncio.create_task(self._hold())

    async def _hold(self) -> None:
        head = self._answer
        try:
            with self.instance.serving():
                async with self._opened as answer:
                    head.set_result(answer)
                    await self._done_with.wait()
        except LegFailure as failure:
            if not head.done():
                head.set_exception(failure)
        finally:
            head.cancel()  # nothing happens where it is done
            del head  # a failure holds this frame, and the future the failure: a circle

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[Answer]:
        """The answer, once its head has come. Raises LegFailure. The leg's own deadline bounds the wait."""
        try:
            yield await asyncio.shield(self._answer)  # whoever waits may be cancelled, the leg is ended by drop()
        finally:
            await self.drop()

    async def drop(self) -> None:
        """Closes it; nobody reads what still comes. Dropped twice is dropped once."""
        if self._task is None:
            return
        task, answer = self._task, self._answer
        if not task.done():
            self._done_with.set() if answer.done() else task.cancel()
        try:
            await asyncio.wait([task])
        finally:
            if answer.done() and not answer.cancelled():
                answer.exception()  # seen: an early leg that failed is made good by an ordinary one
            # A failure in it, or the cancelling, holds the frames it went through, which hold this leg: a circle.
            del self._answer
            self._task = None

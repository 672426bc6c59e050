"""A decode leg that is sent while the prefill is still under way, so that its engine has the prompt's tokens, a place in
its queue, and the first chunks, when the last one comes.

It is used at most once, and whoever does not use it drops it: either way its connection is closed, and with it what its
engine does.
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
        self._task = asyncio.create_task(self._hold())

    async def _hold(self) -> None:
        try:
            with self.instance.serving():
                async with self._opened as answer:
                    self._answer.set_result(answer)
                    await self._done_with.wait()
        except LegFailure as failure:
            if not self._answer.done():
                self._answer.set_exception(failure)
        finally:
            self._answer.cancel()  # nothing happens where it is done

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[Answer]:
        """The answer, once its head has come. Raises LegFailure. The leg's own deadline bounds the wait."""
        try:
            yield await asyncio.shield(self._answer)  # whoever waits may be cancelled, the leg is ended by drop()
        finally:
            await self.drop()

    async def drop(self) -> None:
        """Closes it; nobody reads what still comes."""
        if not self._task.done():
            self._task.cancel() if not self._answer.done() else self._done_with.set()
        await asyncio.wait([self._task])
        if self._answer.done() and not self._answer.cancelled():
            self._answer.exception()  # seen: an early leg that failed is made good by an ordinary one
        # A failure in it, or the cancelling, holds the frames it went through, which hold this leg: a circle.
        del self._answer, self._task

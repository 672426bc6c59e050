"""Asks a source for the list of peers again and again, on a thread of its own: a name server may take its time, and nobody
else's thread, nor the daemon's end, waits for it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from pdserve import log
from pdserve.transfer.peers.sources import Source

#: between two looks at the list of peers
LIST_EVERY_S = 2.0
#: how long the end waits for the source to take our own entry away
CLOSE_S = 3.0


class Follower:
    """`told(URL -> name)` is called in the loop after each look."""

    def __init__(self, source: Source, told: Callable[[dict[str, str]], object]) -> None:
        self._source, self._told = source, told
        self._loop = asyncio.get_running_loop()
        self._ending, self._ended = threading.Event(), asyncio.Event()
        self._log = log.get("peers")
        self._thread = threading.Thread(target=self._run, name="pdserve-peer-list", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                listed = self._source.peers()
                self._post(lambda listed=listed: self._told(listed))  # type: ignore[misc]
            except Exception:  # noqa: BLE001 - whatever it was, the thread goes on
                self._log.exception("the list of peers could not be read; it stays as it was")
            if self._ending.wait(LIST_EVERY_S):
                break
        try:
            self._source.close()
        except Exception:  # noqa: BLE001 - the daemon ends all the same
            self._log.exception("our own entry among the peers was not taken away")
        self._post(self._ended.set)

    def _post(self, function: Callable[[], object]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)

    async def stop(self) -> None:
        """Returns when our own entry is gone, or after a moment: a thread in a name server's hands is left behind."""
        self._ending.set()
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._ended.wait()
        except TimeoutError:
            self._log.warning("the list of peers is still being asked for; not waited for")

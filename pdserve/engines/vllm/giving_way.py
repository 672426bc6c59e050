"""How fast a store goes while others use the device.

A decoding step is held up a little by a store beside it, and a little by a load: both write and read the memory that the step
lives on. Each alone costs a few percent, the two at once cost their sum, and slow each other. So beside a load, while answers are
generated, a store goes slowly: somebody waits for the load's first token, nobody for the store. It never stops, and where other
stores wait it does not go slowly either: what is stored holds blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

#: chunks that are submitted together while answers are generated: as many go on beside a load that begins just then
TOGETHER = 2
#: from chunk to chunk beside a load: of three steps one feels the copy, for a sixth of its time
PAUSE_S = 0.02

T = TypeVar("T")


class GivingWay:
    """Told by the engine's thread (`decoding`) and by the one that loads (`loading`); stores ask. Each a thread of its own."""

    def __init__(self) -> None:
        self.decoding = False
        self._loading = False
        self._changed = threading.Condition()

    def loading(self, now: bool) -> None:
        """Whether chunks are on their way into the engine's blocks."""
        if now != self._loading:
            with self._changed:
                self._loading = now
                self._changed.notify_all()

    def turns(self, chunks: Sequence[T], together: int, others_wait: Callable[[], bool]) -> Iterator[Sequence[T]]:
        """All of them in order, as many at once (`together` at most) and with such pauses between as is right at that moment."""
        at = 0
        while at < len(chunks):
            some = chunks[at : at + self._count(together)]
            yield some
            at += len(some)
            if at < len(chunks) and not others_wait():
                self._pause()

    def _beside_load(self) -> bool:
        return self._loading and self.decoding

    def _count(self, together: int) -> int:
        if self._beside_load():
            return 1
        return min(together, TOGETHER) if self.decoding else together

    def _pause(self) -> None:
        """Ends early with the load."""
        with self._changed:
            self._changed.wait_for(lambda: not self._beside_load(), PAUSE_S)

"""How fast stores and loads go while answers are generated.

A decoding step is held up a little by a store beside it, and a little by a load: both write and read the memory that the step
lives on. Each alone costs a few percent, the two at once cost their sum, and slow each other.

- A store goes in small pieces beside answers, and beside a load slowly: somebody waits for the load's first token, nobody for the
  store. It never stops, and where other stores wait it does not go slowly either: what is stored holds blocks.
- A load costs answers the same in sum however fast it goes; with a share of the bus no step feels much of it, and its own first token
  is later. So it has a share only beside several answers, and all of the bus where other loads wait behind it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pdserve.errors import ConfigError

#: chunks that are submitted together while answers are generated: as many go on as they were when that changes
TOGETHER = 2
#: bytes that a store copies at once then: the engine's own small copies wait for so many, some 20 us. Of the link's speed two
#: thirds are left; 8 MiB leave nine tenths, and the slowest hundredth of the steps feel them.
PIECE_BYTES = 1 << 20
#: from chunk to chunk of a store beside a load: of three steps one feels the copy, for a sixth of its time
PAUSE_S = 0.02
#: of the bus, for a load that no other waits behind, beside so many answers or more
LOAD_SHARE, SEVERAL = 0.6, 4

_KEY = "kv_connector_extra_config.pdserve.load_share"

T = TypeVar("T")


class GivingWay:
    """Told by the engine's thread (`answers`, which are generated on the same device; 0 in a long step) and by the one that loads
    (`loading`); stores and loads ask. Each a thread of its own. `load_share`: of the bus, at most 1; None: LOAD_SHARE."""

    def __init__(self, load_share: float | None = None) -> None:
        self.answers = 0
        self._load_percent = round(100 * (load_share or LOAD_SHARE))
        self._loading = False
        self._changed = threading.Condition()

    def loading(self, now: bool) -> None:
        """Whether chunks are on their way into the engine's blocks."""
        if now != self._loading:
            with self._changed:
                self._loading = now
                self._changed.notify_all()

    def stores(
        self, chunks: Sequence[T], together: int, others_wait: Callable[[], bool]
    ) -> Iterator[tuple[Sequence[T], int]]:
        """All of them in order, as many at once (`together` at most) and with such pauses between as is right at that moment; each
        time with the bytes that may be copied at once (0: a chunk)."""
        at = 0
        while at < len(chunks):
            some = chunks[at : at + self._count(together)]
            yield some, PIECE_BYTES if self.answers else 0
            at += len(some)
            if at < len(chunks) and not others_wait():
                self._pause()

    def loads(
        self, chunks: Sequence[T], together: int, others_wait: Callable[[], bool]
    ) -> Iterator[tuple[Sequence[T], int]]:
        """All of them in order, as many as are best submitted at once, each time with the percent of the bus that they may take."""
        at = 0
        while at < len(chunks):
            percent = self._load_percent if self.answers >= SEVERAL and not others_wait() else 100
            # The first by itself: while it is on its way, the next ones are made ready.
            count = 1 if at == 0 else min(together, TOGETHER) if percent < 100 else together
            yield chunks[at : at + count], percent
            at += count

    def _beside_load(self) -> bool:
        return self._loading and self.answers > 0

    def _count(self, together: int) -> int:
        if self._beside_load():
            return 1
        return min(together, TOGETHER) if self.answers else together

    def _pause(self) -> None:
        """Ends early with the load."""
        with self._changed:
            self._changed.wait_for(lambda: not self._beside_load(), PAUSE_S)


def load_share(wanted: Any) -> float | None:
    """What was asked for, None where nothing was. Raises ConfigError."""
    if wanted is None:
        return None
    if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not 0.1 <= wanted <= 1:
        fix = "Use a number from 0.1 to 1 (all of it), or leave it out."
        raise ConfigError(_KEY, f"{wanted!r} is no share of the bus", fix)
    return float(wanted)

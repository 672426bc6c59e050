"""What a client has been given of one stream: kept as bytes, and read only when another engine has to go on from it.

Reading it costs a JSON decoder's time for every event, which a stream that ends well need not pay at once: bytes are
folded into their sums when they have become many, so that a long stream does not hold on to all of its events either.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

FOLD_AT = 64 * 1024


class Foreign(Exception):
    """An event that is not of the form which all this is about."""


class Kept(ABC):
    """The bytes; what their sums are is a subclass's."""

    def __init__(self) -> None:
        self._raw: list[bytes] = []
        self._size = 0
        self.foreign = False  # events of another form were among them: nothing can be built on the sums

    def add(self, data: bytes) -> None:
        self._raw.append(data)
        self._size += len(data)
        if self._size > FOLD_AT:
            self.fold()

    def fold(self) -> None:
        raw, self._raw, self._size = b"".join(self._raw), [], 0
        self._read(raw)

    @abstractmethod
    def _read(self, raw: bytes) -> None:
        """Whole SSE events into the sums."""

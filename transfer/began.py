"""Who wants to hear at once what was cached of a prompt that begins to be computed: proxies, for their answers' headers.

One line of JSON each, on a connection that stays open. A listener that does not keep up misses lines; nobody waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec

from pdserve.transfer import telling

MOST_LISTENERS = 256
MOST_WAITING = 4096  # lines
#: an empty line when nothing else was sent for so long, so that either end notices when the other is gone
STILL_THERE_S = 5.0


class _Line(msgspec.Struct):
    request: str
    instance: str
    at: float
    cached: dict[str, int]
    load_ms: float | None
    saved_ms: float | None
    load_reason: str


class _Listener:
    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.something = asyncio.Event()


class Listeners:
    """The daemon's loop owns it."""

    def __init__(self) -> None:
        self._listeners: set[_Listener] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._listeners)

    def tell(self, request: str, instance: str, told: telling.Began) -> None:
        if not self._listeners:
            return
        facts = _Line(request, instance, told.at, told.cached, told.load_ms, told.saved_ms, told.load_reason)
        line = msgspec.json.encode(facts) + b"\n"
        for listener in self._listeners:
            if len(listener.lines) < MOST_WAITING:
                listener.lines.append(line)
                listener.something.set()

    async def stream(self) -> AsyncIterator[bytes]:
        """An empty line at once, then what is told from now on, until close()."""
        listener = _Listener()
        self._listeners.add(listener)
        try:
            yield b"\n"
            while not self._closed:
                try:
                    async with asyncio.timeout(STILL_THERE_S):
                        await listener.something.wait()
                except TimeoutError:
                    yield b"\n"
                    continue
                listener.something.clear()
                lines, listener.lines = listener.lines, []
                if lines:
                    yield b"".join(lines)
        finally:
            self._listeners.discard(listener)

    @property
    def full(self) -> bool:
        return len(self._listeners) >= MOST_LISTENERS

    def close(self) -> None:
        """Ends every stream."""
        self._closed = True
        for listener in self._listeners:
            listener.something.set()

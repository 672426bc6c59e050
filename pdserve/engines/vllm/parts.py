"""All pages of one worker: most have one, of all layers; where chunks have layer groups, it is one for each group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pdserve.transfer.arena import Arena
from pdserve.transfer.staging import Pages


class Parts:
    """What concerns the engine's work as a whole is asked here, what concerns a chunk's shards of each part."""

    def __init__(self, parts: Sequence[Pages]) -> None:
        if not parts:
            raise ValueError("a worker without KV")
        self.parts = list(parts)
        self.on_device, self.stores, self.together = parts[0].on_device, parts[0].stores, parts[0].together
        #: of several workers that move the same chunks one tells what was moved
        self.tells = parts[0].stores and parts[0].first_shard == 0

    def describe(self) -> str:
        more = f"; {len(self.parts)} layer groups like this" if len(self.parts) > 1 else ""
        return self.parts[0].describe() + more

    def attach(self, arena: Arena, chunk_tokens: int) -> None:
        for part in self.parts:
            part.attach(arena, chunk_tokens)

    def share(self, percent: int) -> int:
        """One part's, where all of them may take so many percent of the bus: each keeps to its own."""
        return percent if percent == 100 else max(1, percent // len(self.parts))

    def mark(self) -> Any:
        """A point in the engine's work is the same for all parts: they are on one device."""
        return self.parts[0].mark()

    def settle(self) -> None:
        for part in self.parts:
            part.settle()

    def close(self) -> None:
        for part in self.parts:
            part.close()

"""Bytes between each engine and the arena: what a picture of the links is drawn from."""

from __future__ import annotations

from typing import Any

#: more names than a host has engines: one that was given none has a new one with each start
MOST_ENGINES = 64
OTHERS = "others"


class Flows:
    """`counter` has the labels engine, direction, tier."""

    def __init__(self, counter: Any) -> None:
        self._counter = counter
        self._engines: set[str] = set()
        self._made: dict[tuple[str, str, str], Any] = {}

    def stored(self, engine: str, nbytes: int) -> None:
        self._add(engine, "stored", "dram", nbytes)

    def loaded(self, engine: str, tier: str, nbytes: int) -> None:
        """`tier`: where it had been before it was brought into memory."""
        self._add(engine, "loaded", tier, nbytes)

    def _add(self, engine: str, direction: str, tier: str, nbytes: int) -> None:
        made = self._made.get((engine, direction, tier))
        if made is None:  # looking it up in the library takes a lock and its time
            if engine not in self._engines and len(self._engines) >= MOST_ENGINES:
                return self._counter.labels(OTHERS, direction, tier).inc(nbytes)
            self._engines.add(engine)
            made = self._made[engine, direction, tier] = self._counter.labels(engine, direction, tier)
        made.inc(nbytes)

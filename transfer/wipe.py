"""Deleting from the lower tiers: known keys, and what only a tier itself can tell, such as all chunks of a tenant."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from pdserve.transfer.below import Below
from pdserve.transfer.lower import Lower
from pdserve.transfer.tiers.base import ChunkRecord, TierError

#: which of the chunks that a tier lists are meant
Choose = Callable[[Iterable[ChunkRecord]], list[bytes]]

#: see Lower.going
Going = frozenset[bytes] | None

#: what listing a remote tier may take, and keys in one call of its delete()
LIST_S, BATCH = 300.0, 256
CANNOT_LIST = "cannot list what it holds: only chunks that this host knows of were deleted, the others age out"
KEPT = "kept: it may be shared with other hosts; say that shared tiers are meant, too, or delete by salt or by prefix"


class Outcome:
    """What came of one call, by tier; complete once `pending` is empty. Filled in by the loop."""

    def __init__(self) -> None:
        self.pending: set[str] = set()
        self.tiers: dict[str, dict[str, Any]] = {}


class Wipe:
    """Belongs to the loop. Each tier carries out what is asked on its own thread, after what it is writing."""

    def __init__(self, below: Below) -> None:
        self._below = below

    def keys(self, keys: list[bytes], choose: Choose | None = None) -> Outcome:
        """Deletes `keys` everywhere and, with `choose`, what it picks of all that a remote tier lists."""
        outcome = Outcome()
        for lower in self._below.lowers:
            going = frozenset(keys) if choose is None or lower.indexed else None
            self._start(outcome, lower, going, lambda lower=lower: _delete(lower, keys, choose))  # type: ignore[misc]
        return outcome

    def everything(self, shared: bool = False) -> Outcome:
        """All of every tier that is this host's alone, and with `shared` of the others, too."""
        outcome = Outcome()
        for lower in self._below.lowers:
            clear = getattr(lower.tier, "clear", None)
            if clear is not None:
                self._start(outcome, lower, None, lambda clear=clear: (clear(), ""))  # type: ignore[misc]
            elif shared:
                self._start(outcome, lower, None, lambda lower=lower: _delete(lower, [], _all))  # type: ignore[misc]
            else:
                outcome.tiers[lower.name] = {"deleted": 0, "left": KEPT}
        return outcome

    @property
    def busy(self) -> bool:
        return any(lower.deleting for lower in self._below.lowers)

    def _start(self, outcome: Outcome, lower: Lower, going: Going, call: Callable[[], tuple[int, str]]) -> None:
        lower.going.append(going)
        outcome.pending.add(lower.name)
        lower.call_down(lambda: self._on_thread(outcome, lower, going, call))

    def _on_thread(self, outcome: Outcome, lower: Lower, going: Going, call: Callable[[], tuple[int, str]]) -> None:
        count, left, why = 0, "", ""
        try:
            count, left = call()
        except Exception as e:  # noqa: BLE001 - a tier is somebody else's code: the others are deleted from all the same
            why = f"{type(e).__name__}: {e}"
        self._below.post(lambda: self._done(outcome, lower, going, count, left, why))

    def _done(self, outcome: Outcome, lower: Lower, going: Going, count: int, left: str, why: str) -> None:
        lower.going.remove(going)
        outcome.pending.discard(lower.name)
        outcome.tiers[lower.name] = {"deleted": count} | ({"left": why or left} if why or left else {})
        if why:
            self._below.failed(lower.name, "delete", "error", why)


def _all(records: Iterable[ChunkRecord]) -> list[bytes]:
    return [record.key for record in records]


def _delete(lower: Lower, keys: list[bytes], choose: Choose | None) -> tuple[int, str]:
    """(how many were there, what is left and why)."""
    left = ""
    if choose is not None and not lower.indexed:
        listing = getattr(lower.tier, "listing", None)
        listed = listing(time.monotonic() + LIST_S) if listing is not None else None
        try:
            if listed is None:
                left = CANNOT_LIST
            else:
                keys = list({*keys, *choose(listed)})
        except TierError as e:  # what is known goes all the same
            left = f"{CANNOT_LIST} ({e})"
    return sum(lower.tier.delete(keys[i : i + BATCH]) for i in range(0, len(keys), BATCH)), left

"""What remote tiers have: asked on their threads, in the background, and remembered for a while. Runs in the loop."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pdserve.transfer.below import Below
from pdserve.transfer.lower import Lower
from pdserve.transfer.tiers.base import ChunkRecord, TierError

#: how long an answer about a key is good: that it is there, that it is not
KNOWN_S, ABSENT_S = 30.0, 2.0
#: how long a client is told to wait for such an answer
ASK_S = 0.25
#: keys in one question, where it is not all of them
SLICES = {"s3": 32}


@dataclass
class _Known:
    """What remote tiers said of a key."""

    until: float
    asking: int = 0
    found: tuple[Lower, ChunkRecord] | None = None


class Remote:
    def __init__(self, below: Below) -> None:
        self._below = below
        self._known: dict[bytes, _Known] = {}

    def found(self, key: bytes) -> tuple[Lower, ChunkRecord] | None:
        known = self._known.get(key)
        return known.found if known else None

    def asking(self, key: bytes, now: float) -> bool:
        """Whether an answer may still come that is worth waiting for."""
        known = self._known.get(key)
        return known is not None and known.asking > 0 and now < known.until

    def forget(self, key: bytes) -> None:
        self._known.pop(key, None)

    def forget_all(self) -> None:
        self._known.clear()

    def tick(self, now: float) -> None:
        self._known = {k: v for k, v in self._known.items() if v.until > now or v.asking}

    def ask(self, keys: list[bytes], now: float) -> None:
        """Asks every remote tier about the keys that nobody knows about, all in one call for each."""
        remotes = [lower for lower in self._below.lowers if not lower.indexed]
        if not remotes:
            return
        unknown = [
            key
            for key in keys
            if ((known := self._known.get(key)) is None or (known.until < now and not known.asking))
            and self._below.store.peek(key) is None
        ]
        if not unknown:
            return
        asked = {key: _Known(now + ASK_S, len(remotes)) for key in unknown}
        self._known |= asked
        for lower in remotes:
            lower.call_up(lambda lower=lower: self._ask_on_thread(lower, asked))  # type: ignore[misc]

    def _ask_on_thread(self, lower: Lower, asked: dict[bytes, _Known]) -> None:
        keys = list(asked)
        started = time.monotonic()
        records: list[ChunkRecord | None] = []
        why = ""
        # A store that is asked once for each key is not asked for what lies beyond the first that it lacks.
        size = SLICES.get(lower.name, len(keys))
        try:
            while len(records) < len(keys) and (not records or records[-1] is not None):
                records += lower.tier.contains(keys[len(records) : len(records) + size])
        except TierError as e:
            why = str(e)
        except Exception as e:  # noqa: BLE001 - as in _read_on_thread
            why = f"{type(e).__name__}: {e}"
        records += [None] * (len(keys) - len(records))
        seconds = time.monotonic() - started
        self._below.post(lambda: self._answered(lower, asked, records, why, seconds))

    def _answered(
        self, lower: Lower, asked: dict[bytes, _Known], records: list[ChunkRecord | None], why: str, seconds: float
    ) -> None:
        self._below.metrics["cache_tier_seconds"].labels(lower.name, "contains").observe(seconds)
        if why:
            self._below.failed(lower.name, "contains", "error", why)
        now = time.monotonic()
        # What was forgotten since (deleted, gone) is in no list any more: an old answer says nothing of a key that is asked for anew.
        for known, record in zip(asked.values(), records, strict=True):
            known.asking -= 1
            if record is not None and known.found is None:
                known.found = (lower, record)
            known.until = now + (KNOWN_S if known.found else ABSENT_S if not known.asking else ASK_S)

"""Why a chunk of a prompt was computed, in a sentence. Pure: all that is known goes in."""

from __future__ import annotations

from dataclasses import dataclass, field

from pdserve.transfer.gone import Removal
from pdserve.transfer.prompts import Like

#: shorter beginnings than this are alike by template or chance, and no reason
FEW = 16
_CHOICES = {
    "slower": "it was in the cache, but computing it was estimated to be faster than loading it",
    "short": "it was in the cache, but too few tokens of it to be worth a load",
    "never": "the engine is set to load only what a producer hands over",
    "unavailable": "the cache daemon did not answer the engine in time",
}
_LOST = {
    "corrupt": "was thrown away {ago}: its bytes did not match their digest",
    "dropped": "was deleted {ago} on request",
    "cleared": "was deleted {ago} when the cache was emptied",
    "full": "could not be stored {ago}: the cache had no room",
    "late": "was in {tier}, which did not give it in time ({ago})",
    "error": "was in {tier}, which failed to give it ({ago})",
    "gone": "had been in {tier} and is not there any more ({ago})",
    "no_room": "was in {tier}, but memory had no room to bring it up ({ago})",
}


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a prompt's misses as a whole."""

    at: float  # when the cache was asked
    since: float  # as far back as is remembered
    engine: str = ""  # the engine's own reason
    same: Like | None = None
    other: Like | None = None
    other_is: str = ""  # what differs there: another cache_salt, another adapter, another model or layout
    left_alone: tuple[str, ...] = field(default=())  # lower tiers that are not asked at present
    forgotten: bool = False


@dataclass(frozen=True, slots=True)
class Missed:
    """One chunk, tokens `start` to `end`."""

    start: int
    end: int
    full: bool
    found: bool  # the cache had it
    removal: Removal | None
    stored_later: bool = False


def sentence(chunk: Missed, known: Known) -> str:
    word, _, detail = known.engine.partition(": ")
    if chunk.found:
        return _CHOICES.get(known.engine, known.engine or "it was in the cache, and was not loaded")
    if not chunk.full and chunk.end - chunk.start < FEW:
        return f"the prompt's last {chunk.end - chunk.start} tokens do not fill a chunk and are too few to be kept"
    if word in ("never", "unavailable"):  # whether the cache had it is not known
        return f"{_CHOICES[word]} ({detail})" if detail else _CHOICES[word]
    if chunk.removal is not None:
        return removed(chunk.removal, known.at)
    reason = _by_prompts(chunk, known) or _never(chunk, known)
    if known.left_alone:
        reason += f"; {' and '.join(known.left_alone)} could not be asked (circuit open after failures)"
    if known.engine and known.engine not in _CHOICES:
        reason = f"{known.engine}; {reason}"
    return reason


def removed(removal: Removal, at: float) -> str:
    ago = f"{max(0.0, at - removal.at):.1f} s before"
    if removal.reason == "capacity":
        whom = f" to make room for what {removal.by} stored" if removal.by else " to make room"
        return f"evicted from {removal.tier} {ago}{whom}"
    return _LOST.get(removal.reason, "was removed {ago}").format(ago=ago, tier=removal.tier)


def _by_prompts(chunk: Missed, known: Known) -> str:
    same = known.same.common if known.same else 0
    other = known.other.common if known.other else 0
    if known.other is not None and other >= chunk.end > same:
        return f"request {known.other.prompt.request} had the same tokens, but under {known.other_is}: never shared"
    if known.same is None or (same < FEW and same < known.same.prompt.tokens):
        return ""
    who = f"request {known.same.prompt.request}"
    if same >= chunk.end:
        if not chunk.full:
            return (
                f"{who} had the same tokens up to here and went on: its chunk was longer, and only whole chunks match"
            )
        return f"{who} had the same tokens, but the chunk was not in the cache yet or could not be stored"
    if same in (known.same.prompt.asked, known.same.prompt.tokens):
        return (
            f"{who} was the same and ended at token {same}: its last chunk was not full, and matches no longer prompt"
        )
    where = "here" if same >= chunk.start else "before this chunk"
    return f"the prompt differs from that of {who} at token {same}, {where}"


def _never(chunk: Missed, known: Known) -> str:
    kind = "" if chunk.full else " (the prompt's last chunk, not full)"
    limit = ", as far as is remembered" if known.forgotten else ""
    return f"never stored{limit}: no prompt like it in the last {_span(known.at - known.since)}{kind}"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"

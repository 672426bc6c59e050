"""What engines told of their requests, and what the daemon can add: a bounded ring, read by `GET /requests/ID`.

Why a chunk was missing is judged when the engine tells of it, as things were when it asked: a moment later it has
computed and stored the chunk itself. The daemon's loop owns all of this.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from pdserve.chunk import tenant_tag
from pdserve.request_id import client_id
from pdserve.transfer import telling, why
from pdserve.transfer.began import Listeners
from pdserve.transfer.gone import Gone
from pdserve.transfer.prompts import Prompt, Prompts

MOST, MOST_BYTES = 4096, 32 << 20
MOST_SPANS = 64
NOBODY = tenant_tag("")
Run = tuple[int, int, str, str]  # first chunk, how many, source, why


@dataclass(slots=True)
class _Leg:
    instance: str = ""
    told: telling.Leg | None = None
    runs: list[Run] = field(default_factory=list)
    spans: list[telling.Span] = field(default_factory=list)
    ended: telling.Ended | None = None
    size: int = 400


class Requests:
    """`left_alone()`: names of lower tiers that are not asked at present; `since`: when all this began to be remembered."""

    def __init__(self, gone: Gone, left_alone: Callable[[], Iterable[str]], since: float) -> None:
        self._gone, self._left_alone, self._since = gone, left_alone, since
        self.prompts = Prompts()
        self._legs: OrderedDict[str, _Leg] = OrderedDict()
        self._by_request: dict[str, list[str]] = {}
        self._size = 0
        self.lost = 0
        #: told of (instance, leg, spans of it, whether the leg is new) once both are known; for tracing
        self.on_told: Callable[[str, telling.Leg, list[telling.Span], bool], None] | None = None
        self.listeners = Listeners()
        #: told of each prompt: (client's id, keys of its chunks, tokens of a whole chunk, tokens of the prompt)
        self.on_prompt: Callable[[str, list[bytes], int, int], None] | None = None

    def __len__(self) -> int:
        return len(self._legs)

    @property
    def size(self) -> int:
        return self._size + self.prompts.size

    def stats(self) -> dict[str, int]:
        """`lost`: facts that engines could not tell."""
        return {"legs": len(self._legs), "prompts": len(self.prompts), "bytes": self.size, "lost": self.lost}

    # ---- taking ----

    def take(self, facts: telling.Facts, instance: str) -> None:
        self.lost += facts.lost
        for item in facts.items:
            if isinstance(item, telling.Began):
                self.listeners.tell(client_id(item.leg), instance, item)
                continue
            leg = self._leg(item.leg, instance)
            match item:
                case telling.Leg():
                    self._take_leg(leg, item)
                case telling.Span():
                    if len(leg.spans) < MOST_SPANS:
                        leg.spans.append(item)
                        self._grow(leg, 300)
                case telling.Ended():
                    self._take_end(leg, item)
            if self.on_told is not None and leg.told is not None and not isinstance(item, telling.Ended):
                new = isinstance(item, telling.Leg)
                self.on_told(instance, leg.told, list(leg.spans) if new else [item], new)  # type: ignore[list-item]
        while len(self._legs) > MOST or (self._size > MOST_BYTES and len(self._legs) > 1):
            self._forget_oldest()

    def _leg(self, name: str, instance: str) -> _Leg:
        leg = self._legs.get(name)
        if leg is None:
            leg = self._legs[name] = _Leg(instance)
            self._size += leg.size
            self._by_request.setdefault(client_id(name), []).append(name)
        return leg

    def _grow(self, leg: _Leg, by: int) -> None:
        leg.size += by
        self._size += by

    def _take_leg(self, leg: _Leg, told: telling.Leg) -> None:
        prompt = Prompt(
            told.leg, client_id(told.leg), leg.instance, told.at, (told.base, told.lora, told.tag), told.tokens,
            told.tokens, told.marks, told.edges,
        )  # fmt: skip
        leg.runs = self._judged(told, prompt)
        # The keys stay, the marks live with the prompts only.
        leg.told = telling.Leg(*(getattr(told, name) for name in telling.Leg.__struct_fields__[:-2]))
        self._grow(leg, 100 * len(told.keys) + 60 * len(told.tiers) + 500)
        self.prompts.add(prompt)
        if self.on_prompt is not None:
            self.on_prompt(prompt.request, told.keys, told.chunk_tokens, told.tokens)

    def _take_end(self, leg: _Leg, ended: telling.Ended) -> None:
        leg.ended = ended
        prompt = self.prompts.get(ended.leg)
        if prompt is not None and ended.marks and ended.tokens > prompt.tokens:
            self.prompts.add(
                Prompt(
                    prompt.leg, prompt.request, prompt.instance, prompt.at, prompt.root, prompt.asked, ended.tokens, ended.marks,
                    ended.edges,
                )
            )  # fmt: skip
        leg.ended = telling.Ended(ended.leg, ended.output_tokens, ended.reason, ended.tokens)

    def _forget_oldest(self) -> None:
        name, leg = self._legs.popitem(last=False)
        self._size -= leg.size
        request = client_id(name)
        left = [other for other in self._by_request.get(request, ()) if other != name]
        if left:
            self._by_request[request] = left
        else:
            self._by_request.pop(request, None)

    # ---- judging ----

    def _judged(self, told: telling.Leg, prompt: Prompt) -> list[Run]:
        same, other = self.prompts.nearest(prompt)
        other_is = _difference(prompt.root, other.prompt.root) if other else ""
        known = why.Known(
            told.at, self._since, told.why, same, other, other_is, tuple(self._left_alone()), self._gone.forgotten
        )
        runs: list[Run] = []
        for index in range(len(told.keys)):
            source = self._source(told, index)
            reason = self._reason(told, index, known) if source == "computed" else ""
            if runs and runs[-1][2:] == (source, reason):
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, source, reason)
            else:
                runs.append((index, 1, source, reason))
        return runs

    @staticmethod
    def _source(told: telling.Leg, index: int) -> str:
        start, end = _span(told, index)
        place = index - told.first_chunk
        if 0 <= place < len(told.tiers) and start < told.covered:
            return told.tiers[place]
        return "gpu" if end <= told.local else "computed"

    def _reason(self, told: telling.Leg, index: int, known: why.Known) -> str:
        start, end = _span(told, index)
        key = told.keys[index]
        found = 0 <= index - told.first_chunk < told.found
        removal = None if found else self._gone.removal(key, told.at)
        missed = why.Missed(start, end, end - start == told.chunk_tokens, found, removal)
        text = why.sentence(missed, known)
        return f"the engine itself had it up to token {told.local}; {text}" if start < told.local else text

    # ---- showing ----

    def told(self, ids: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """Request id -> its legs, the oldest first. Ids of which nothing is known are left out."""
        shown = {}
        for request in ids:
            legs = [self._shown(self._legs[name]) for name in self._by_request.get(request, ()) if name in self._legs]
            if legs:
                shown[request] = legs
        return shown

    def keys(self, request: str, tokens: int) -> list[bytes] | None:
        """The keys of the whole chunks within a prompt's first `tokens` tokens; None if no leg of it is known."""
        legs = [self._legs[name].told for name in self._by_request.get(request, ()) if name in self._legs]
        told = next((leg for leg in reversed(legs) if leg is not None), None)
        return None if told is None else told.keys[: min(tokens, told.tokens) // told.chunk_tokens]

    def _shown(self, leg: _Leg) -> dict[str, Any]:
        told, ended = leg.told, leg.ended
        loads = [span.ms for span in leg.spans if span.name == "load"]
        shown: dict[str, Any] = {
            "instance": leg.instance,
            "spans": [_span_shown(span) for span in leg.spans] + (self.arrivals(told) if told else []),
            "output_tokens": ended.output_tokens if ended else None,
            "finish_reason": ended.reason if ended else None,
            "load_ms": round(sum(loads), 3) if loads else 0.0 if told else None,
            "notes": [],
        }
        if told is not None:
            shown |= {
                "leg": told.leg,
                "at": told.at,
                "prompt_tokens": told.tokens,
                "saved_ms": told.saved_ms,
                "cached_tokens": cached(told),
                "chunks": [chunk for run in leg.runs for chunk in _chunks(told, run)],
            }
        return shown

    def arrivals(self, told: telling.Leg) -> list[dict[str, Any]]:
        """What was brought up from lower tiers for this leg: one span for each tier."""
        by_tier: dict[str, list[Any]] = {}
        for place, tier in enumerate(told.tiers):
            at = told.first_chunk + place
            if tier != "dram" and at < len(told.keys):
                arrival = self._gone.arrival(told.keys[at], told.at - 60, told.at + 60)
                if arrival is not None:
                    by_tier.setdefault(tier, []).append(arrival)
        shown = []
        for tier, found in by_tier.items():
            begun = min(a.at - a.seconds for a in found)
            ms = (max(a.at for a in found) - begun) * 1000
            detail = f"{len(found)} chunks brought up from {tier}"
            span = {"name": "load", "at": begun, "ms": round(ms, 3), "bytes": sum(a.nbytes for a in found)}
            shown.append({**span, "tokens": None, "tier": tier, "detail": detail})
        return shown


def cached(told: telling.Leg) -> dict[str, int]:
    """Tokens that were not computed, by where they came from."""
    counts = {"gpu": told.local} if told.local else {}
    for place, tier in enumerate(told.tiers):
        start, end = _span(told, told.first_chunk + place)
        tokens = min(end, told.covered) - max(start, told.local)
        if tokens > 0:
            counts[tier] = counts.get(tier, 0) + tokens
    return counts


def _span(told: telling.Leg, index: int) -> tuple[int, int]:
    start = index * told.chunk_tokens
    return start, min(start + told.chunk_tokens, told.tokens)


def _chunks(told: telling.Leg, run: Run) -> Iterable[dict[str, Any]]:
    first, count, source, reason = run
    for index in range(first, first + count):
        start, end = _span(told, index)
        yield {
            "index": index,
            "first_token": start,
            "tokens": end - start,
            "key": told.keys[index].hex()[:16],
            "source": source,
            "why": reason or None,
        }


def _span_shown(span: telling.Span) -> dict[str, Any]:
    return {
        "name": span.name,
        "at": span.at,
        "ms": span.ms,
        "bytes": span.bytes,
        "tokens": span.tokens,
        "tier": span.tier or None,
        "detail": span.detail or None,
    }


def _difference(mine: tuple[bytes, str, bytes], other: tuple[bytes, str, bytes]) -> str:
    if mine[0] != other[0]:
        return "another model or KV layout"
    if mine[1] != other[1]:
        return "another LoRA adapter" if other[1] else "no LoRA adapter"
    return "another cache_salt" if other[2] != NOBODY else "no cache_salt"

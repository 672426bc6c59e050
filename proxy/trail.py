"""Where one request has been: its states with their times, and the instances that were tried. Pure.

The state machine (lifetime.py) notes when it entered each state; the splitter notes each leg. All that a record says of
time is read from these two, so that a span cannot tell another story than the one that happened.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pdserve.proxy.lifetime import State

if TYPE_CHECKING:
    from pdserve.proxy.tracing import Traced

MOST_LEGS = 16  # more than one request can have; a bound all the same
Times = Sequence[tuple[State, float]]
Span = dict[str, Any]


class Leg:
    """One engine asked for one part. `failure` says why it did not work out."""

    __slots__ = ("began", "ended", "failure", "handed_on", "instance", "kind")

    def __init__(self, kind: str, instance: str) -> None:
        self.kind, self.instance, self.began = kind, instance, time.perf_counter()
        self.ended = 0.0
        self.failure = ""
        self.handed_on = False  # a prefill leg whose own first token was the client's


class Trail:
    """The legs of one request, in order."""

    __slots__ = ("handed", "legs", "traced")

    def __init__(self) -> None:
        self.legs: list[Leg] = []
        self.handed: dict[str, Any] | None = None  # what the producer's reply told of its own cache hits
        self.traced: Traced | None = None  # its spans, where it is one of those that are traced

    def leg(self, kind: str, instance: str) -> None:
        """A leg begins: "prefill" or "decode"."""
        if len(self.legs) < MOST_LEGS:
            self.legs.append(Leg(kind, instance))
            if self.traced is not None:
                self.traced.leg(kind, instance, self.legs[-1].began)

    def lost(self, why: str) -> None:
        """The leg that runs has failed."""
        if self.legs and not self.legs[-1].failure:
            self.legs[-1].failure, self.legs[-1].ended = why[:200] or "failed", time.perf_counter()
            if self.traced is not None:
                self.traced.leg_ended(self.legs[-1].ended, self.legs[-1].failure)

    def done(self) -> None:
        """The leg that runs has given what it was asked for."""
        if self.legs:
            self.legs[-1].ended = time.perf_counter()
            if self.traced is not None:
                self.traced.leg_ended(self.legs[-1].ended)

    def handed_on(self) -> None:
        """The first token is that of the leg that has just ended."""
        if self.legs:
            self.legs[-1].handed_on = True

    @property
    def recoveries(self) -> int:
        return sum(1 for leg in self.legs if leg.failure)


def headers(handed: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What is known of the cache before the first byte of an answer goes out, as parts of x-pdserve- headers."""
    if handed is None:
        return []
    cached = ",".join(f"{tier}={tokens}" for tier, tokens in handed["cached"].items())
    found = [("cached-tokens", cached)]
    for name in ("load", "saved"):
        if (ms := handed[f"{name}_ms"]) is not None:
            found.append((f"{name}-ms", f"{ms:.1f}"))
    if (reason := handed["load_reason"]).isalpha():
        found.append(("load-reason", reason))
    return found


def spans(arrived: float, times: Times, legs: Sequence[Leg], now: float) -> list[Span]:
    """In order of their beginning; a state that lasts still ends `now`."""
    found = []
    for (state, began), (_, ended) in zip(times, [*times[1:], (None, now)], strict=True):
        if state is State.QUEUED:
            found.append(_span("queue", "proxy", arrived, began, ended, ""))
    first, behind = first_token(times), ""
    for leg in legs:
        ended = leg.ended or min(now, times[-1][1] if times[-1][0] in _OVER else now)
        if leg.failure:
            found.append(_span("retry", leg.instance, arrived, leg.began, ended, f"{leg.kind} leg: {leg.failure}"))
            behind = "" if leg.kind == "decode" else behind
        elif leg.kind == "prefill":
            found.append(_span("prefill", leg.instance, arrived, leg.began, ended, ""))
            if leg.handed_on and first:
                found.append(_span("first_token", leg.instance, arrived, ended, first, "computed with the prompt"))
                behind = f"went on behind the first token of {leg.instance}"
        elif first and first >= leg.began:
            found.append(_span("first_token", leg.instance, arrived, leg.began, first, ""))
            found.append(_span("decode", leg.instance, arrived, first, ended, ""))
        elif first:  # it went on with a stream that another engine had begun
            why = behind or "went on after another engine died"
            found.append(_span("decode", leg.instance, arrived, leg.began, ended, why))
        else:
            found.append(_span("decode", leg.instance, arrived, leg.began, ended, "the answer came in one piece"))
    return sorted(found, key=lambda span: float(span["start_ms"]))


_OVER = (State.DONE, State.FAILED, State.ABORTED)


def first_token(times: Times) -> float | None:
    """When the first event was given to the client; None where the answer was no stream."""
    return next((at for state, at in times if state is State.STREAMING), None)


def _span(name: str, instance: str, arrived: float, began: float, ended: float, detail: str) -> Span:
    return {
        "name": name,
        "instance": instance,
        "start_ms": _ms(began - arrived),
        "ms": _ms(ended - began),
        "bytes": None,
        "tokens": None,
        "tier": None,
        "detail": detail or None,
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)

"""A deployment that runs, tried out: the same prompt twice, and from which prompt length on loading beats computing.

Prompts are fresh, so nothing else can have stored them. Where engines can empty their own prefix caches
(VLLM_SERVER_DEV_MODE=1) the second answer can only come out of pdserve's cache; where not, engines' own counters tell
both kinds of hit apart.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

from pdserve.doctor.finding import Finding, fail, ok, skip, warn
from pdserve.doctor.fit import Line, crossing, line
from pdserve.doctor.subject import Subject
from pdserve.errors import PdserveError, UpstreamError
from pdserve.openai_client import Client, Prompt
from pdserve.prompts import make_ids, story
from pdserve.target import Target

HITS, BREAK_EVEN = "hit test", "break-even"
HITS_DEADLINE, BREAK_EVEN_DEADLINE = 90.0, 180.0
_REQUEST_SECONDS = 60.0
_WHOLE_CHUNKS = 2
_TAIL = 40
_ANSWER = 4
_SETTLE_SECONDS = 5.0
#: prompt lengths of the fit, in chunks; longer than the engines take are left out
_CHUNKS = (1, 4, 10)
_FIRST_TRIES = 2
_FAKE = "fake engines compute and store nothing"


@dataclass(frozen=True)
class Tried:
    """One prompt sent twice. `external_*`: prompt tokens that the answering engines took from pdserve, None: not told."""

    prompt_tokens: int
    chunk_tokens: int
    cold_ttft: float
    warm_ttft: float
    cold_cached: int | None
    warm_cached: int | None
    external_cold: int | None
    external_warm: int | None
    emptied: bool
    is_pd: bool

    @property
    def whole(self) -> int:
        return (self.prompt_tokens - 1) // self.chunk_tokens * self.chunk_tokens


def hits(subject: Subject) -> Iterator[Finding]:
    target = subject.running
    if target is None:
        return
    if not target.has_cache:
        yield skip(HITS, "this deployment has no cache")
        return
    if subject.is_fake:
        yield skip(HITS, _FAKE)
        return
    try:
        with Client(target.url, timeout=_REQUEST_SECONDS) as client:
            length = min(_WHOLE_CHUNKS * target.chunk_tokens + _TAIL, client.max_model_len() - _ANSWER - 1)
            if length <= target.chunk_tokens:
                yield skip(HITS, f"max_model_len leaves no room for a chunk of {target.chunk_tokens} tokens")
                return
            yield judge_hits(send_twice(target, client, length))
    except PdserveError as error:
        yield _no_answer(HITS, error)


def send_twice(target: Target, client: Client, length: int, rng: random.Random | None = None) -> Tried:
    ids = prompt_of(rng or random.SystemRandom(), client, length)
    at_start = target.retrieved_tokens()
    cold = client.complete(ids, max_tokens=_ANSWER)
    at_cold = target.retrieved_tokens()
    target.wait_for_no_leases(_SETTLE_SECONDS)  # the last chunks are stored behind the answer
    emptied = target.empty_engine_caches()
    warm = client.complete(ids, max_tokens=_ANSWER)
    at_warm = target.retrieved_tokens()
    return Tried(
        prompt_tokens=cold.prompt_tokens,
        chunk_tokens=target.chunk_tokens,
        cold_ttft=cold.ttft,
        warm_ttft=warm.ttft,
        cold_cached=cold.cached_tokens,
        warm_cached=warm.cached_tokens,
        external_cold=None if at_start is None or at_cold is None else at_cold - at_start,
        external_warm=None if at_cold is None or at_warm is None else at_warm - at_cold,
        emptied=emptied,
        is_pd=target.is_pd,
    )


def prompt_of(rng: random.Random, client: Client, length: int) -> Prompt:
    """Exactly so many tokens where the server has /tokenize, else a text of about as many."""
    try:
        return make_ids(rng, client.tokenize, length)
    except (UpstreamError, KeyError):
        return story(rng, length * 3 // 4)


def judge_hits(t: Tried) -> Finding:
    cached = t.warm_cached or 0
    text = (
        f"{t.prompt_tokens} tokens: cold {t.cold_ttft:.2f} s, warm {t.warm_ttft:.2f} s, {cached} hit"
        f" ({'-' if t.external_warm is None else t.external_warm} from pdserve)"
    )
    if t.is_pd and t.external_cold is not None and t.external_cold < t.whole:
        means = (
            f"Prefill did not hand over: the consumer took {t.external_cold} of {t.whole} tokens and computed the rest."
        )
        return fail(HITS, text, means, _HAND_OVER_FIX)
    if cached == 0:
        means = "The same prompt was computed twice: nothing is stored, or what is stored is not found."
        return fail(HITS, text, means, _NO_HIT_FIX)
    if cached < t.whole:
        means = f"Of {t.whole} tokens in whole chunks only {cached} were hit."
        return warn(HITS, text, means, "Is the cache full (pdserve cache status)? Raise cache.size.")
    if t.emptied and t.external_warm is not None and t.external_warm < t.whole:
        means = f"The engines' caches were empty, and still only {t.external_warm} tokens came from pdserve."
        return fail(HITS, text, means, _NO_HIT_FIX)
    if not t.emptied and not t.is_pd and not t.external_warm:
        note = "; by the engine's own cache: VLLM_SERVER_DEV_MODE=1 in engine.env lets the doctor empty it"
        return ok(HITS, text + note)
    return ok(HITS, text)


_HAND_OVER_FIX = (
    "Look for `handover not begun` and `not available` in the consumers' logs (pdserve status names them); "
    "pdserve cache status shows whether the cache is full."
)
_NO_HIT_FIX = (
    "Do the engines have the connector (`PdserveConnector` in their logs)? Does pdserve cache status list them as clients? "
    "Do model, dtype and block size agree? See docs/troubleshooting.md, zero hits."
)


def _no_answer(name: str, error: PdserveError) -> Finding:
    status = error.status if isinstance(error, UpstreamError) else 0
    if status == 401:
        fix = "This deployment wants an API key, and the doctor has none: ask an engine's URL, or a proxy without api_keys."
        return skip(name, f"HTTP 401. {fix}")
    means = "A plain request did not get through; nothing can be said about hits."
    return fail(name, f"{error}"[:200], means, "pdserve status, then the logs of what is not ready.")


# --- break-even ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """(prompt tokens, seconds to the first token), computed and loaded."""

    cold: list[tuple[int, float]]
    warm: list[tuple[int, float]]
    emptied: bool


def break_even(subject: Subject) -> Iterator[Finding]:
    target = subject.running
    if target is None:
        return
    if not target.has_cache:
        yield skip(BREAK_EVEN, "this deployment has no cache")
        return
    if subject.is_fake:
        yield skip(BREAK_EVEN, _FAKE)
        return
    try:
        with Client(target.url, timeout=_REQUEST_SECONDS) as client:
            yield judge_break_even(measure(target, client), target.chunk_tokens)
    except PdserveError as error:
        yield _no_answer(BREAK_EVEN, error)


def measure(target: Target, client: Client, seconds: float = 120.0) -> Measured:
    """The best of two tries at each length; stops early rather than overrun."""
    ends = time.monotonic() + seconds
    longest = client.max_model_len() - _ANSWER - 1
    lengths = sorted({min(n * target.chunk_tokens + _TAIL, longest) for n in _CHUNKS})
    cold, warm, emptied = [], [], True
    send_twice(target, client, lengths[0])  # the first request of an idle engine is slower
    for length in lengths:
        tries: list[Tried] = []
        while len(tries) < _FIRST_TRIES and (not tries or time.monotonic() < ends):
            tries.append(send_twice(target, client, length))
        emptied &= all(t.emptied for t in tries)
        cold.append((length, min(t.cold_ttft for t in tries)))
        warm.append((length, min(t.warm_ttft for t in tries)))
        if time.monotonic() > ends:
            break
    return Measured(cold, warm, emptied)


def judge_break_even(m: Measured, chunk_tokens: int) -> Finding:
    if len(m.cold) < 2:
        return skip(BREAK_EVEN, "fewer than two lengths could be measured in time")
    computed, loaded = line(m.cold), line(m.warm)
    text = "; ".join(f"{n}: {c:.2f}/{w:.2f} s" for (n, c), (_, w) in zip(m.cold, m.warm, strict=True))
    whose = "" if m.emptied else " (warm also hits the engines' own caches: VLLM_SERVER_DEV_MODE=1 would exclude them)"
    facts = {"computed": computed, "loaded": loaded, "cold": m.cold, "warm": m.warm}
    at = crossing(computed, loaded)
    if at is None:
        means = f"Computed/loaded {text}{whose}. The cache costs time here at every length that was tried."
        return warn(BREAK_EVEN, "loading never beats computing here", means, _NEVER_FIX, **facts)
    tokens = max(chunk_tokens, -(-round(at) // chunk_tokens) * chunk_tokens)
    rates = f"{_rate(computed)} computed, {_rate(loaded)} loaded"
    return ok(BREAK_EVEN, f"loading wins from {tokens} tokens on ({rates}; {text}){whose}", tokens=tokens, **facts)


_NEVER_FIX = (
    "Is the prompt long enough, the tier near enough? See docs/tuning.md, when not to use the cache; "
    "engines measure the same and compute by themselves where that is faster."
)


def _rate(fit: Line) -> str:
    return f"{1 / fit.slope:.0f} tokens/s" if fit.slope > 0 else "the same at every length"

"""When two greedy answers to the same prompt count as the same. Pure functions; verify, demo and the tests share them.

float32: every token is equal. In bfloat16 and float16 the engine itself is not stable: computing a prompt in another
batch shape (a prefix hit, for example) flips near ties. There the answers must follow each other: as long as they
agree, each token's log-probability differs by at most the tolerance; where they part, it was a near tie in both, which
means that each side's own choice beats the other's by at most the tolerance. KV of another prompt, of another layer or
of another position moves log-probabilities by whole units and fails that at the first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.openai_client import Completion, TokenLogprob

# Measured between plain vLLM's own cold run and its own prefix hit in bfloat16: docs/decisions.md.
DEFAULT_TOLERANCE = 0.5
TOP_LOGPROBS = 5

# Where the cache stores KV rounded, whatever the engine computes in: docs/decisions.md.
ROUNDED_TOLERANCE = {"int8": 0.5, "fp8": 1.0}

# In these the tokens themselves must be equal.
EXACT_DTYPES = frozenset({"float32", "float"})


@dataclass(frozen=True, slots=True)
class Rule:
    """How to compare: exact tokens, or log-probabilities within `tolerance`."""

    exact: bool
    tolerance: float = DEFAULT_TOLERANCE

    @classmethod
    def for_dtype(cls, dtype: str, tolerance: float | None = None, payload: str = "") -> Rule:
        """`payload`: the topology's cache.payload; what was rounded on its way into the cache gives near ties at best."""
        if tolerance is None:
            tolerance = ROUNDED_TOLERANCE.get(payload, DEFAULT_TOLERANCE)
        return cls(not payload and dtype.removeprefix("torch.") in EXACT_DTYPES, tolerance)

    def __str__(self) -> str:
        return "greedy tokens equal" if self.exact else f"log-probabilities within {self.tolerance:g}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome. `parted` is the first place with different tokens, None when there is none."""

    same: bool
    tokens_equal: bool
    parted: int | None
    max_difference: float
    reason: str = ""


def compare(reference: Completion, answer: Completion, rule: Rule) -> Comparison:
    """Compares two finished answers of the same prompt under the rule."""
    parted = first_difference(reference.token_ids, answer.token_ids)
    if reference.prompt_tokens != answer.prompt_tokens:
        reason = f"the prompt has {reference.prompt_tokens} tokens there and {answer.prompt_tokens} here"
        return Comparison(False, parted is None, parted, 0.0, reason)
    if not reference.token_ids or not answer.token_ids:
        return Comparison(False, parted is None, parted, 0.0, "an answer carries no token ids")
    difference, reason = _logprob_difference(reference.logprobs, answer.logprobs, parted, rule.tolerance)
    if rule.exact:
        reason = "" if parted is None else _parted_sentence(reference.token_ids, answer.token_ids, parted)
    elif not reason and parted is None and reference.text != answer.text:
        reason = "equal tokens gave different text"
    return Comparison(not reason, parted is None, parted, difference, reason)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first index at which two sequences differ (a missing element differs), None if they are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


def _parted_sentence(a: Sequence[int], b: Sequence[int], at: int) -> str:
    left = a[at] if at < len(a) else "the end"
    right = b[at] if at < len(b) else "the end"
    return f"token {at}: {left} there, {right} here"


def _logprob_difference(
    a: Sequence[TokenLogprob], b: Sequence[TokenLogprob], parted: int | None, tolerance: float
) -> tuple[float, str]:
    """The largest difference up to where the answers part, and the sentence if one is beyond the tolerance."""
    agree = min(len(a), len(b)) if parted is None else min(parted, len(a), len(b))
    worst = 0.0
    for i in range(agree):
        gap = abs(a[i].logprob - b[i].logprob)
        worst = max(worst, gap)
        if gap > tolerance:
            return worst, f"token {i}: log-probability {a[i].logprob:.3f} there, {b[i].logprob:.3f} here"
    if not a or not b:
        return worst, "an answer carries no log-probabilities"
    if parted is not None:
        if parted >= min(len(a), len(b)):
            return worst, f"one answer ends at token {parted}, the other goes on"
        for mine, other in ((a[parted], b[parted]), (b[parted], a[parted])):
            rival = mine.top.get(other.token)
            gap = float("inf") if rival is None else mine.logprob - rival
            worst = max(worst, gap if rival is not None else 0.0)
            if gap > tolerance:
                return worst, f"token {parted}: {mine.token} was chosen over {other.token}, and it was no near tie"
    return worst, ""

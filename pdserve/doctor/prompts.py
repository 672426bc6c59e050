"""`--prompts FILE`: what in the user's own requests keeps them from sharing a prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from pdserve import prompt_stability
from pdserve.doctor.finding import Finding, ok, warn
from pdserve.doctor.subject import Subject

NAME = "prompts"
DEADLINE = 120.0
_MOST = 10


def check(subject: Subject) -> Iterator[Finding]:
    if subject.prompts is not None:
        yield from judge(prompt_stability.analyse(subject.prompts))


def judge(found: Sequence[prompt_stability.Finding]) -> Iterator[Finding]:
    """The costliest place of each kind; how often, and what all of that kind cost."""
    if not found:
        yield ok(NAME, "every request repeats an earlier one's beginning, or has nothing in common with any")
        return
    counts, lost = Counter(f.kind for f in found), Counter[str]()
    worst: dict[str, prompt_stability.Finding] = {}
    for f in found:
        lost[f.kind] += f.lost_tokens
        worst[f.kind] = max(worst.get(f.kind, f), f, key=lambda one: one.lost_tokens)
    for kind, tokens in lost.most_common(_MOST):
        f = worst[kind]
        text = (
            f"{kind}: {counts[kind]} times, {tokens} tokens computed again. Line {f.line}, {f.path}: {f.was} -> {f.now}"
        )
        means = f"Behind the first difference nothing is reused: {f.shared_tokens} tokens shared, {f.lost_tokens} lost there."
        yield warn(NAME, text, means, f.fix, kind=kind, times=counts[kind], lost_tokens=tokens)

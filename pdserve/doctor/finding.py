"""What a check has to say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "skip", "warn", "fail"]
#: the worse, the later
ORDER: tuple[Status, ...] = ("ok", "skip", "warn", "fail")
EXIT_CODES: dict[Status, int] = {"ok": 0, "skip": 0, "warn": 4, "fail": 1}


@dataclass(frozen=True)
class Finding:
    """`found` is one line: what is there. `means` and `fix` are for warn and fail: what follows from it, what to do."""

    check: str
    status: Status
    found: str
    means: str = ""
    fix: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def ok(check: str, found: str, **facts: Any) -> Finding:
    return Finding(check, "ok", found, facts=facts)


def skip(check: str, why: str) -> Finding:
    return Finding(check, "skip", why)


def warn(check: str, found: str, means: str, fix: str, **facts: Any) -> Finding:
    return Finding(check, "warn", found, means, fix, facts)


def fail(check: str, found: str, means: str, fix: str, **facts: Any) -> Finding:
    return Finding(check, "fail", found, means, fix, facts)


def worst(findings: Iterable[Finding]) -> Status:
    return max((f.status for f in findings), key=ORDER.index, default="ok")


def exit_code(findings: Iterable[Finding]) -> int:
    return EXIT_CODES[worst(findings)]

"""Runs checks side by side. A check that hangs (a driver, a dead mount) is reported and given up, never waited for."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pdserve.doctor.finding import Finding, warn
from pdserve.doctor.subject import Subject

Run = Callable[[Subject], Iterable[Finding]]


@dataclass(frozen=True)
class Check:
    """`alone`: it measures, so nothing else may run beside it; these run last, in order."""

    name: str
    run: Run
    deadline: float = 10.0
    alone: bool = False


def run(
    checks: Sequence[Check], subject: Subject, told: Callable[[str, int], None] = lambda doing, done: None
) -> list[Finding]:
    """Findings in the order of `checks`. `told(what is being done, how many are done)` as it goes on."""
    together = [check for check in checks if not check.alone]
    found = _side_by_side(together, subject, lambda doing, done: told(doing, done))
    for n, check in enumerate(check for check in checks if check.alone):
        told(check.name, len(together) + n)
        found |= _side_by_side([check], subject, lambda doing, done: None)
    told("", len(checks))
    return [finding for check in checks for finding in found[check.name]]


def _side_by_side(
    checks: Sequence[Check], subject: Subject, told: Callable[[str, int], None]
) -> dict[str, list[Finding]]:
    """Daemon threads: one that never returns cannot keep the process alive. Bounded: one a check."""
    done: queue.SimpleQueue[tuple[str, list[Finding]]] = queue.SimpleQueue()
    begun = time.monotonic()
    for check in checks:
        threading.Thread(target=_one, args=(check, subject, done), name=f"doctor {check.name}", daemon=True).start()
    found: dict[str, list[Finding]] = {}
    waiting = {check.name: check for check in checks}
    while waiting:
        nearest = min(check.deadline for check in waiting.values())
        told(", ".join(sorted(waiting)), len(found))
        try:
            name, findings = done.get(timeout=max(0.0, begun + nearest - time.monotonic()))
        except queue.Empty:
            late = [check for check in waiting.values() if begun + check.deadline <= time.monotonic()]
            for check in late:
                del waiting[check.name]
                found[check.name] = [_too_late(check)]
            continue
        if waiting.pop(name, None) is not None:
            found[name] = findings
    return found


def _one(check: Check, subject: Subject, done: queue.SimpleQueue[tuple[str, list[Finding]]]) -> None:
    try:
        findings = list(check.run(subject))
    except Exception as error:  # noqa: BLE001 - one broken check must not hide what the others found
        findings = [_broken(check, error)]
    done.put((check.name, findings))


def _too_late(check: Check) -> Finding:
    means = "What it looks at does not answer: a driver, a mount or a host hangs, or the machine is very busy."
    return warn(check.name, f"no result in time ({check.deadline:g} s)", means, "Run the doctor again when it is quiet.")


def _broken(check: Check, error: Exception) -> Finding:
    found = f"the check itself failed: {type(error).__name__}: {error}"
    return warn(check.name, found, "Nothing is known about this point.", "Please report it, with this line.")

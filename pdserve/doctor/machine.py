"""What launch would refuse: model, cores, memory, the run directory. The same functions, each as a finding of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from pdserve.deploy import preflight
from pdserve.deploy.plan import Plan
from pdserve.doctor.finding import Finding, fail, ok
from pdserve.doctor.subject import Subject
from pdserve.errors import ConfigError

MODEL, CORES, MEMORY, FOLDER = "model", "cores", "memory", "run directory"


def model(subject: Subject) -> Iterator[Finding]:
    if subject.problem is not None:
        yield refused(MODEL, subject.problem)
        return
    plan = subject.plan
    if plan is None:
        return
    where = plan.context.model.source + ("" if plan.context.model.local else " (vLLM fetches it from the hub)")
    yield from _asked(MODEL, lambda: preflight.check_model(plan), where)


def cores(subject: Subject) -> Iterator[Finding]:
    usable = sorted(os.sched_getaffinity(0))
    plan = subject.plan
    if plan is None:
        yield ok(CORES, f"{len(usable)} usable")
        return
    yield from _asked(CORES, lambda: preflight.check_cores(plan, usable), f"{len(usable)} usable")


def memory(subject: Subject) -> Iterator[Finding]:
    available = preflight.available_memory()
    plan = subject.plan
    if plan is None or subject.running is not None:
        yield ok(MEMORY, f"{preflight.gib(available)} available")
        return
    need = sum(preflight.memory_needs(plan).values())
    text = f"{preflight.gib(available)} available, about {preflight.gib(need)} needed"
    yield from _asked(MEMORY, lambda: preflight.check_memory(plan, available), text)


def folder(subject: Subject) -> Iterator[Finding]:
    if subject.plan is not None:
        yield from _asked(FOLDER, lambda: _check_folder(subject.plan), str(subject.plan.run_dir))


def _check_folder(plan: Plan | None) -> None:
    assert plan is not None
    preflight.check_socket_path(plan)
    here = plan.run_dir
    while not here.exists():
        here = here.parent
    if not os.access(here, os.W_OK):
        raise ConfigError("PDSERVE_RUN_DIR", f"{here} cannot be written to", "Set it to a folder of yours.")


def _asked(name: str, question: Callable[[], None], found: str) -> Iterator[Finding]:
    try:
        question()
    except ConfigError as error:
        yield refused(name, error)
        return
    yield ok(name, found)


def refused(name: str, error: ConfigError) -> Finding:
    found = f"{error.key}: {error.problem}" if error.key else error.problem
    return fail(name, found, "pdserve launch refuses this and starts nothing.", error.fix or "Change that key.")

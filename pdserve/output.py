"""How every command prints: tables that fit 80 columns, JSON, progress on a terminal. rich honours NO_COLOR by itself.

On a terminal its own width counts, elsewhere 80 columns; what does not fit is folded, never cut, so that a pipe loses
nothing.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

WIDTH = 80
FIRST_LINE_S, LINE_EVERY_S = 2.0, 10.0  # of progress where there is no terminal
STYLES = {
    "ok": "green",
    "ready": "green",
    "warn": "yellow",
    "starting": "yellow",
    "restarting": "yellow",
    "degraded": "yellow",
    "unhealthy": "red",
    "fail": "bold red",
    "failed": "bold red",
    "lost": "bold red",
    "skip": "dim",
    "stopped": "dim",
    "waiting": "dim",
}


def console(stream: TextIO | None = None) -> Console:
    stream = stream or sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else WIDTH)


def print_json(facts: Any) -> int:
    """Returns 0, so that a command can end with it."""
    json.dump(facts, sys.stdout, indent=1, default=str)
    print()
    return 0


def table(
    head: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = (), stream: TextIO | None = None
) -> None:
    """A plain table. Columns named in `right` hold numbers; cells that are a known state are coloured on a terminal."""
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", show_header=any(head))
    for name in head:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=name in right)
    for row in rows:
        made.add_row(*(Text(str(cell), STYLES.get(str(cell), "")) for cell in row))
    console(stream).print(made)


class Steps(Protocol):
    """Where a long piece of work is."""

    def step(self, text: str, done: float | None = None) -> None:
        """What is being done now, and how much is done."""


class _Bar:
    def __init__(self, progress: Progress, total: int | None) -> None:
        self._progress, self._task = progress, progress.add_task("", total=total)

    def step(self, text: str, done: float | None = None) -> None:
        self._progress.update(self._task, description=text, completed=done)


class _Lines:
    """A line after FIRST_LINE_S, and one every LINE_EVERY_S from then on, from a thread: the work itself may be one call."""

    def __init__(self, stream: TextIO, total: int | None) -> None:
        self._stream, self._total = stream, total
        self._now: tuple[str, float | None] = ("", None)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(time.monotonic(),), name="progress", daemon=True)
        self._thread.start()

    def step(self, text: str, done: float | None = None) -> None:
        self._now = (text, done)

    def end(self) -> None:
        self._over.set()
        self._thread.join(LINE_EVERY_S)

    def _run(self, began: float) -> None:
        wait = FIRST_LINE_S
        while not self._over.wait(wait):
            wait = LINE_EVERY_S
            text, done = self._now
            far = f", {done:g} of {self._total} done" if done is not None and self._total else ""
            with suppress(OSError, ValueError):  # nobody reads it any more
                self._stream.write(f"{text or 'working'}{far}, {time.monotonic() - began:.0f} s\n")
                self._stream.flush()


@contextmanager
def steps(total: int | None = None, stream: TextIO | None = None) -> Iterator[Steps]:
    """On stderr: where that is a terminal a bar, which is gone when the work is done; else a plain line now and then. `total`
    None: how much there is, is not known."""
    stream = stream or sys.stderr
    if not stream.isatty():
        lines = _Lines(stream, total)
        try:
            yield lines
        finally:
            lines.end()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        yield _Bar(progress, total)

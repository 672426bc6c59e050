"""How every command prints: tables that fit 80 columns, JSON, progress on a terminal. rich honours NO_COLOR by itself.

On a terminal its own width counts, elsewhere 80 columns; what does not fit is folded, never cut, so that a pipe loses
nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

WIDTH = 80
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


class Steps:
    """Where a long piece of work is. `step` says what is being done now; `total` None: how much there is, is not known."""

    def __init__(self, progress: Progress | None, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total) if progress else None

    def step(self, text: str, done: float | None = None) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text, completed=done)


@contextmanager
def steps(total: int | None = None, stream: TextIO | None = None) -> Iterator[Steps]:
    """A progress bar on stderr, and only where that is a terminal: it is gone when the work is done."""
    stream = stream or sys.stderr
    if not stream.isatty():
        yield Steps(None, total)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        yield Steps(progress, total)

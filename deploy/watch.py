"""Showing a deployment come up: a live table on a terminal, plain lines elsewhere (a pipe, a CI log)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pdserve.deploy import logtail
from pdserve.deploy.state import Deployment, ProcessRecord

HEARTBEAT_SECONDS = 15.0
_STYLES = {"ready": "green", "starting": "yellow", "restarting": "yellow", "unhealthy": "red", "failed": "bold red"}
_STYLES |= {"stopping": "yellow", "waiting": "dim", "stopped": "dim", "lost": "bold red"}


class Watch:
    """Shows each deployment handed to `show`; call it often (it decides what is news), and `close` at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False)
        self._live: Live | None = None
        self._told: dict[str, tuple[str, str]] = {}
        self._next_beat = 0.0

    def show(self, deployment: Deployment) -> None:
        if not self._console.is_terminal or deployment.state not in ("starting", "stopping"):
            self._end_table()
            self._lines(deployment)
            return
        self._remember(deployment)
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=deployment.state == "stopping")
            self._live.start()
        self._live.update(table(deployment, self._console.width), refresh=True)

    def close(self) -> None:
        self._end_table()

    def _end_table(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _remember(self, deployment: Deployment) -> None:
        self._told = {record.name: (record.state, record.detail) for record in deployment.processes}

    def _lines(self, deployment: Deployment) -> None:
        age = f"[{time.time() - deployment.started:5.0f} s]"
        if not self._told:
            self._next_beat = time.monotonic() + HEARTBEAT_SECONDS
        for record in deployment.processes:
            news = (record.state, record.detail)
            if self._told.get(record.name, ("waiting", "")) != news:
                self._print(f"{age} {record.name:10} {record.state:10} {record.detail or _about(record)}")
        self._remember(deployment)
        if time.monotonic() > self._next_beat:
            self._next_beat = time.monotonic() + HEARTBEAT_SECONDS
            for record in deployment.processes:
                if record.state == "starting":
                    self._print(f"{age} {record.name:10} {'...':10} {logtail.doing(Path(record.log))}")

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=not self._console.is_terminal, overflow="ellipsis", no_wrap=True)


def _about(record: ProcessRecord) -> str:
    return {"ready": record.url, "starting": f"pid {record.pid}", "stopped": ""}.get(record.state, "")


def table(deployment: Deployment, width: int, states: dict[str, str] | None = None) -> Table:
    """The live view: which process, its state, for how long, what it is doing. `states` overrides what is recorded."""
    age = time.time() - deployment.started
    grid = Table(
        title=f"{deployment.name}: {deployment.state}, {duration(age)}",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for column in ("process", "state", "for", "what it is doing"):
        grid.add_column(column, no_wrap=True, header_style="dim", overflow="ellipsis", ratio=None)
    room = max(20, width - 38)
    for record in deployment.processes:
        state = (states or {}).get(record.name, record.state)
        doing = record.detail or (logtail.doing(Path(record.log)) if state == "starting" else _about(record))
        grid.add_row(
            record.name, Text(state, _STYLES.get(state, "")), duration(time.time() - record.since), Text(doing[:room])
        )
    return grid


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

"""`pdserve logs`: what all processes of a deployment say, in order of time, vLLM's own lines among them."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from pdserve import logs
from pdserve.deploy import state
from pdserve.errors import ConfigError, NotRunning
from pdserve.logs import Line, Reader

EXAMPLES = """examples:
  pdserve logs                           all of what runs, merged
  pdserve logs local-cpu -f              and what comes from now on
  pdserve logs --request my-id           only lines about one request
  pdserve logs --since 10m --json        for programs
"""
EVERY_S = 0.2
#: while following: a line may come this much later than a younger one of another file, and is still put before it
PATIENCE_S = 0.3
_COLOURS = ("36", "32", "33", "35", "34", "96", "92", "95")
_ENGINES = ("prefill", "decode", "both", "plain")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="the deployment (default: the one that runs, else the latest)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what comes, through restarts, until Ctrl-C")
    parser.add_argument("--request", metavar="ID", help="only lines that are about this request")
    text = "only lines from then on: 30s, 10m, 2h, 1d ago, or a time (14:05, 2026-01-31 14:05:00)"
    parser.add_argument("--since", metavar="WHEN", help=text)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def main(args: argparse.Namespace) -> int:
    try:
        start = logs.since(args.since, time.time()) if args.since else 0.0
    except ValueError as e:
        raise ConfigError("--since", str(e)) from e
    deployment = find(args.name)
    readers = {path: _reader(deployment, path) for path in _files(deployment)}
    if not readers:
        raise NotRunning(f"{deployment.name} has written no logs yet ({deployment.run_dir}/logs)")
    out = Printer(sys.stdout, args.json, [reader_name(path) for path in readers])
    try:
        out.all(_wanted(logs.merged(readers.values()), start, args.request))
        while args.follow:
            time.sleep(EVERY_S)
            for path in _files(deployment):
                readers.setdefault(path, _reader(deployment, path))
            out.all(_wanted(_together(readers.values()), start, args.request))
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        for reader in readers.values():
            reader.close()
    return 0


def _together(readers: Iterable[Reader]) -> list[Line]:
    """What has come in the last moment, in order; files are asked twice, so that one is not ahead of another."""
    lines = [line for reader in readers for line in reader.new()]
    if lines:
        time.sleep(PATIENCE_S)
        lines += [line for reader in readers for line in reader.new()]
    return sorted(lines, key=lambda line: line.at)


def _wanted(lines: Iterable[Line], start: float, request: str | None) -> Iterator[Line]:
    wanted = (line for line in lines if line.at >= start)
    return logs.about(wanted, request) if request else wanted


def find(name: str | None) -> state.Deployment:
    """Raises NotRunning."""
    known = [d for d in state.read_all() if name is None or d.name == name]
    running = [d for d in known if d.supervisor_alive()]
    if name is None and len(running) > 1:
        raise ConfigError("NAME", f"{len(running)} deployments run", f"Say which: {', '.join(d.name for d in running)}.")
    if not known:
        raise NotRunning(f"{name} is not running and never was" if name else "nothing is running and nothing ever was")
    return max(running or known, key=lambda d: d.started)


def _files(deployment: state.Deployment) -> list[Path]:
    return sorted(Path(deployment.run_dir, "logs").glob("*.log"))


def reader_name(path: Path) -> str:
    return path.stem


def _reader(deployment: state.Deployment, path: Path) -> Reader:
    role = next((p.role for p in deployment.processes if p.log == str(path)), path.stem)
    return Reader(path, path.stem, "engine" if role in _ENGINES else role, deployment.started)


class Printer:
    """Text for people, coloured by process on a terminal only, or JSON."""

    def __init__(self, stream: TextIO, as_json: bool, names: list[str]) -> None:
        self._stream, self._json = stream, as_json
        self._width = max(map(len, names), default=0)
        self._colour = stream.isatty() and not os.environ.get("NO_COLOR") and not as_json
        self._names = {name: _COLOURS[n % len(_COLOURS)] for n, name in enumerate(names)}

    def all(self, lines: Iterable[Line]) -> None:
        for line in lines:
            self._stream.write((json.dumps(line.as_json(), ensure_ascii=False) if self._json else self._text(line)) + "\n")
        self._stream.flush()

    def _text(self, line: Line) -> str:
        millis = int(line.at * 1000) % 1000
        at = time.strftime("%m-%d %H:%M:%S", time.localtime(line.at)) + f".{millis:03d}" if line.own else " " * 18
        name, level, message = f"{line.instance:{self._width}}", f"{line.level:7}" if line.own else " " * 7, line.message
        if self._colour:
            name = f"\x1b[{self._names.get(line.instance, '37')}m{name}\x1b[0m"
            if line.level in ("WARNING", "ERROR", "CRITICAL"):
                message = f"\x1b[{'33' if line.level == 'WARNING' else '31'}m{message}\x1b[0m"
            at = f"\x1b[2m{at}\x1b[0m"
        return f"{at} {name} {level} {message}"

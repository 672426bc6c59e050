"""Log lines of all processes of a deployment, read, dated and put in order of time. Bounded: files are streamed.

Lines come in three forms: pdserve's text, pdserve's JSON, vLLM's own. A line without a time of its own (a traceback, a
progress bar) belongs to the one before it.
"""

from __future__ import annotations

import calendar
import heapq
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pdserve import log

MOST_LINE = 64 * 1024
_READ = 1 << 20
_VLLM = re.compile(
    r"^(?:\((?P<part>\S+) pid=(?P<pid>\d+)\)\s+)?(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+"
    r"(?P<time>\d\d-\d\d \d\d:\d\d:\d\d)\s+)?(?P<where>\[[\w./]+:\d+\]\s)?"
)
_START = re.compile(r"^--- pdserve: (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ")
# uvicorn's, and what `pdserve launch` says while it starts: neither has a time of day.
_UVICORN = re.compile(r"^(INFO|WARNING|ERROR|CRITICAL):\s+")
_LAUNCH = re.compile(r"^\[\s*(\d+) s\] ")
_SPAN = re.compile(r"^(\d+(?:\.\d+)?)([smhd])$")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(slots=True)
class Line:
    """`at` is unix time; `own` says whether the line had a time itself, `begins` whether it begins a message: it may do so
    without a time."""

    at: float
    own: bool
    level: str
    process: str
    instance: str
    pid: int | None
    request_id: str | None
    message: str
    begins: bool = True

    def as_json(self) -> dict[str, Any]:
        return {
            "time": log.utc(self.at), "level": self.level, "process": self.process, "instance": self.instance,
            "pid": self.pid, "request_id": self.request_id, "message": self.message,
        }  # fmt: skip


class Reader:
    """One file's lines, in the order in which they stand there; goes on where it stopped when asked again."""

    def __init__(self, path: Path, instance: str, process: str, started: float = 0.0) -> None:
        """`started`: what the times of a launch count from."""
        self._path, self._started = path, started
        self._file: BinaryIO | None = None
        self._rest = b""
        self._last = Line(0.0, False, "INFO", process, instance, None, None, "")

    def to_end(self) -> None:
        """Leaves out what is there already."""
        if self._open() is not None:
            assert self._file is not None
            self._file.seek(0, os.SEEK_END)

    def new(self) -> Iterator[Line]:
        """What has come since. A file that was replaced or cut is read from its beginning."""
        while (data := self._read()) or self._reopened():
            *whole, self._rest = (self._rest + data).split(b"\n")
            if len(self._rest) > MOST_LINE:
                whole, self._rest = [*whole, self._rest], b""
            for raw in whole:
                if text := raw[:MOST_LINE].decode(errors="replace").rsplit("\r", 1)[-1].rstrip():
                    yield self._line(text)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO | None:
        if self._file is None:
            try:
                self._file = self._path.open("rb")
            except OSError:
                return None
        return self._file

    def _read(self) -> bytes:
        there = self._open()
        return b"" if there is None else there.read(_READ)

    def _reopened(self) -> bool:
        """Whether another file is there by now, or this one has become shorter."""
        if self._file is None:
            return False
        try:
            now, held = self._path.stat(), os.fstat(self._file.fileno())
        except FileNotFoundError:
            return False
        if (now.st_ino, now.st_dev) == (held.st_ino, held.st_dev) and now.st_size >= self._file.tell():
            return False
        self.close()
        self._rest = b""
        return self._open() is not None

    def _line(self, text: str) -> Line:
        line = parsed(text, self._last, self._started)
        line.at = max(line.at, self._last.at)  # a file is in order, whatever clocks say of it
        self._last = line
        return line


def parsed(text: str, before: Line, started: float = 0.0) -> Line:
    """One line; what it does not say itself is as in the line before it."""
    if text.startswith("{") and (line := _json(text, before)) is not None:
        return line
    who = (before.process, before.instance)  # a file is one process's, under the name that the deployment gives it
    if found := log.HEAD.match(text):
        message = text[found.end() :]
        day, _, millis = found["time"].partition(".")
        at = time.mktime(time.strptime(day, "%Y-%m-%d %H:%M:%S")) + int(millis) / 1000
        return Line(
            at, True, found["level"], *who, int(found["pid"]), log.request_of(message), f"{found['part']} {message}"
        )
    if found := _START.match(text):
        at = time.mktime(time.strptime(found[1], "%Y-%m-%d %H:%M:%S"))
        return Line(at, True, "INFO", *who, None, None, "started: " + text[found.end() :])
    if started and (found := _LAUNCH.match(text)):
        return Line(started + int(found[1]), True, "INFO", *who, None, None, text[found.end() :])
    found = _VLLM.match(text)
    assert found is not None, "it matches nothing at all too"
    message = (found["where"] or "") + text[found.end() :]
    if found["part"]:
        message = f"{found['part']} {message}"
    pid = int(found["pid"]) if found["pid"] else before.pid
    if found["time"] is None:
        if short := _UVICORN.match(text[found.end() :]):
            message = f"{found['part'] or 'uvicorn'} {text[found.end() + short.end() :]}"
            return Line(before.at, False, short[1], *who, pid, None, message)
        return Line(before.at, False, before.level, *who, pid, before.request_id, message, begins=False)
    return Line(_this_year(found["time"]), True, found["level"], *who, pid, log.request_of(message), message)


def _json(text: str, before: Line) -> Line | None:
    try:
        told = json.loads(text)
        at = calendar.timegm(time.strptime(told["time"][:19], "%Y-%m-%dT%H:%M:%S")) + int(told["time"][20:23]) / 1000
        message = f"{told['part']} {told['message']}"
        if "exception" in told:
            message += "\n" + str(told["exception"])
        who = (before.process, before.instance, int(told["pid"]))
        return Line(at, True, str(told["level"]), *who, told["request_id"], message)
    except (ValueError, KeyError, TypeError):
        return None


def _this_year(text: str) -> float:
    """vLLM leaves the year out; a day that would lie ahead is last year's."""
    year = time.localtime().tm_year
    try:
        at = time.mktime(time.strptime(f"{year}-{text}", "%Y-%m-%d %H:%M:%S"))
    except ValueError:  # 29 February
        at = time.mktime(time.strptime(f"{year - 1}-{text}", "%Y-%m-%d %H:%M:%S"))
    if at > time.time() + 86400:
        at = time.mktime(time.strptime(f"{year - 1}-{text}", "%Y-%m-%d %H:%M:%S"))
    return at


def merged(readers: Iterable[Reader]) -> Iterator[Line]:
    """All that is there now, in order of time; of each file one line at a time is held."""
    return heapq.merge(*(reader.new() for reader in readers), key=lambda line: line.at)


def about(lines: Iterable[Line], request: str) -> Iterator[Line]:
    """Those that name the request, and what follows them without a time of its own."""
    name = re.compile(rf"(?<![0-9A-Za-z]){re.escape(request)}(?![0-9A-Za-z])")
    speaking: dict[str, bool] = {}
    for line in lines:
        named = bool(name.search(line.message) or (line.request_id and name.search(line.request_id)))
        if line.begins or named:
            speaking[line.instance] = named
        if speaking.get(line.instance):
            yield line


def since(text: str, now: float) -> float:
    """ "10m", "2h", "30s", "1d", a time of today, or a date with a time -> unix time. Raises ValueError."""
    if found := _SPAN.match(text):
        return now - float(found[1]) * _UNITS[found[2]]
    day = time.strftime("%Y-%m-%d", time.localtime(now))
    for form, value in (("%Y-%m-%d %H:%M:%S", f"{day} {text}"), ("%Y-%m-%d %H:%M", f"{day} {text}"),
                        ("%Y-%m-%d %H:%M:%S", text.replace("T", " ")), ("%Y-%m-%d", text)):  # fmt: skip
        try:
            return time.mktime(time.strptime(value, form))
        except ValueError:
            continue
    raise ValueError(f"{text!r} is neither a span (30s, 10m, 2h, 1d) nor a time (14:05, 2026-01-31 14:05:00)")

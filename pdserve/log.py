"""Logging: one line per event with time, level, process, instance, part and, where there is one, the request id.

Two forms: text for people, JSON for machines (--log-format, or PDSERVE_LOG_FORMAT, which a deployment's processes inherit).
A message names its request as `request_id=ID` at its end, or begins with `request ID:`; both forms have it as a field.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
from typing import Final

from pdserve import env
from pdserve.request_id import client_id

FORMATS: Final = ("text", "json")
#: the parts of a text line, for whoever reads one
HEAD: Final = re.compile(
    r"^(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}) (?P<level>[A-Z]+) (?:(?P<process>[\w.-]+):)?"
    r"(?P<instance>[\w.-]+)\[(?P<pid>\d+)\] (?P<part>pdserve[\w.-]*) "
)
_REQUEST: Final = re.compile(r"(?:^request (\S+): | request_id=(\S+)$)")


def get(name: str) -> logging.Logger:
    """The logger of a part, e.g. get("proxy") -> pdserve.proxy."""
    return logging.getLogger(f"pdserve.{name}")


def add_argument(parser: argparse.ArgumentParser) -> None:
    text = "how log lines are written (default: PDSERVE_LOG_FORMAT, else text)"
    parser.add_argument("--log-format", choices=FORMATS, help=text)


def setup(process: str = "pdserve", instance: str = "", form: str | None = None, stream: object = None) -> None:
    """Sends pdserve's log lines to stderr. Safe to call twice; does not touch the root logger (vLLM owns it in an engine)."""
    root = logging.getLogger("pdserve")
    root.setLevel(env.log_level().upper())
    root.propagate = False
    for old in list(root.handlers):
        root.removeHandler(old)
    handler = logging.StreamHandler(stream or sys.stderr)  # type: ignore[arg-type]
    made = Json if (form or env.log_format()) == "json" else Text
    handler.setFormatter(made(process, instance or process))
    root.addHandler(handler)


def request_of(message: str) -> str | None:
    """The request that a message is about, by its client's id."""
    found = _REQUEST.search(message)
    return None if found is None else client_id(found[1] or found[2])


class Text(logging.Formatter):
    def __init__(self, process: str, instance: str) -> None:
        super().__init__()
        self._who = instance if instance == process else f"{process}:{instance}"

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        head = f"{at}.{int(record.msecs):03d} {record.levelname} {self._who}[{record.process}] {record.name}"
        text = f"{head} {record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class Json(logging.Formatter):
    """One object a line, whatever is in the message."""

    def __init__(self, process: str, instance: str) -> None:
        super().__init__()
        self._process, self._instance = process, instance

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        made: dict[str, object] = {
            "time": utc(record.created),
            "level": record.levelname,
            "process": self._process,
            "instance": self._instance,
            "pid": record.process or os.getpid(),
            "part": record.name,
            "request_id": self.request(message),
            "message": message,
        }
        if record.exc_info:
            made["exception"] = self.formatException(record.exc_info)
        return json.dumps(made, ensure_ascii=False)

    def request(self, message: str) -> str | None:
        return request_of(message)


def utc(at: float) -> str:
    """RFC 3339 with milliseconds."""
    millis = round(at * 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(millis // 1000)) + f".{millis % 1000:03d}Z"

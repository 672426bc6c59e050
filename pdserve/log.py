"""Logging: one line per event, time, level, part and, where there is one, the request id."""

from __future__ import annotations

import logging
import sys

from pdserve import env

_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def get(name: str) -> logging.Logger:
    """The logger of a part, e.g. get("proxy") -> pdserve.proxy."""
    return logging.getLogger(f"pdserve.{name}")


def setup(stream: object = None) -> None:
    """Sends pdserve's log lines to stderr. Safe to call twice; does not touch the root logger (vLLM owns it in an engine)."""
    root = logging.getLogger("pdserve")
    root.setLevel(env.log_level().upper())
    root.propagate = False
    for old in list(root.handlers):
        root.removeHandler(old)
    handler = logging.StreamHandler(stream or sys.stderr)  # type: ignore[arg-type]
    handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
    root.addHandler(handler)

"""vLLM's own log lines as JSON: lines.json beside this file names `handler`, and VLLM_LOGGING_CONFIG_PATH that file.

Every process of an engine reads it when it imports vLLM, and uvicorn is given the same. Here nothing of vLLM is
imported. What is written past `logging` (progress bars, libraries in C) stays as it is.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from types import TracebackType
from typing import Final

from pdserve import env, log
from pdserve.request_id import client_id

CONFIG: Final = Path(__file__).with_name("lines.json")
_NAMED: Final = re.compile(r"(?<![\w-])(?:chat)?cmpl-[\w.:-]*\w")


class Lines(log.Json):
    """As our own, with the request that vLLM names in its own way."""

    def request(self, message: str) -> str | None:
        if found := super().request(message):
            return found
        named = {client_id(name) for name in _NAMED.findall(message)}
        return named.pop() if len(named) == 1 else None


def handler() -> logging.Handler:
    """For everything that is logged in this process but our own lines, which have theirs."""
    made = logging.StreamHandler(sys.stderr)
    made.setFormatter(Lines("engine", env.instance() or "engine"))
    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper())
    logging.captureWarnings(True)
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _last_words
    return made


def _last_words(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What ended the process, as one record."""
    if issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    logging.getLogger("vllm").critical("ended by %s", kind.__name__, exc_info=(kind, error, trace))

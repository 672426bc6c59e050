"""Reading a process's log for a human: what it is doing now, and why it died."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pdserve.deploy.backends.local import LOG_HEAD

_TAIL_BYTES = 64 * 1024
# "(EngineCore pid=123) INFO 11-22 01:15:52 [cpu_worker.py:97] " and pdserve's own (pdserve/log.py).
_VLLM_HEAD = re.compile(
    r"^(\(\S+ pid=\d+\)\s+)?((DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+\d\d-\d\d \d\d:\d\d:\d\d\s+)?(\[[\w./]+:\d+\]\s*)?"
)
# vLLM's lines, newest stage first, and what they mean to who waits.
_STAGES = (
    ("Application startup complete", "answering"),
    ("Available routes are", "opening its port"),
    ("Starting vLLM server", "opening its port"),
    ("init engine (", "preparing the API"),
    ("Capturing CUDA graphs", "capturing CUDA graphs"),
    ("KV cache size: ", "warming up"),
    ("Dynamo bytecode transform", "compiling"),
    ("Loading weights took", "making room for the KV cache"),
    ("Starting to load model", "loading the weights"),
    ("world_size=", "starting workers"),
    ("Initializing a V1 LLM engine", "starting workers"),
    ("Resolved architecture", "starting the engine"),
)
_OUR_HEAD = re.compile(r"^(?:[\d-]{10} )?\d\d:\d\d:\d\d(?:\.\d+)? [A-Z]+ (?:\S+\[\d+\] )?pdserve\.")
_ERROR = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)\b:? ?\S?")
# Says only that something else failed; the cause stands above it.
_CONSEQUENCE = ("Engine core initialization failed", "See root cause above", "Engine process failed to start")


def tail(log: Path, lines: int = 15) -> list[str]:
    """The last lines of the newest start, without blank ones."""
    return [line for line in _this_start(log) if line.strip()][-lines:]


def doing(log: Path) -> str:
    """What a process is at: the stage that its newest telling line stands for, else that line itself."""
    newest = ""
    for line in reversed(_this_start(log)):
        text = _strip(line)
        if stage := next((words for phrase, words in _STAGES if phrase in text), ""):
            return stage
        if "%|" in text:  # a progress bar
            return text
        if not newest and _says_something(line, text):
            newest = text
    return newest or "starting up"


def _says_something(line: str, text: str) -> bool:
    noise = ("Traceback", "File ", "warn")
    return len(text) > 3 and any(c.isalpha() for c in text) and not text.startswith(noise) and "WARNING" not in line


def cause(log: Path) -> str:
    """The last error that is not merely the consequence of another; "" when there is none."""
    for line in reversed(_this_start(log)):
        text = _strip(line)
        if _ERROR.match(text) and not any(phrase in text for phrase in _CONSEQUENCE):
            return text
    return ""


def _strip(line: str) -> str:
    return _OUR_HEAD.sub("", _VLLM_HEAD.sub("", line.rstrip())).strip()


def _plain(line: str) -> list[str]:
    """A JSON line as the text lines that would say the same, its traceback included; another line as it is."""
    if not line.startswith('{"time"'):
        return [line]
    try:
        told = json.loads(line)
        part = "" if told["part"].startswith("vllm") else told["part"].removeprefix("pdserve.") + " "
        head = f"{told['level']} {told['time'][5:10]} {told['time'][11:19]} {part}"
        return [*f"{head}{told['message']}".split("\n"), *told.get("exception", "").split("\n")]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [line]


def _this_start(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    raw = [line.rsplit("\r", 1)[-1] for line in text.replace("\r\n", "\n").split("\n")]
    lines = [one for line in raw for one in _plain(line)]
    heads = [i for i, line in enumerate(lines) if line.startswith(LOG_HEAD)]
    return lines[heads[-1] + 1 :] if heads else lines

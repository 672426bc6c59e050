"""What a log says to a human: the newest stage, the cause of death, and only the newest start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdserve.deploy import logtail

HEAD = "--- pdserve: 2026-01-01 00:00:00 vllm serve m\n"
INFO = "(EngineCore pid=7) INFO 11-22 01:46:48 [core.py:133] "


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "x.log"


@pytest.mark.parametrize(
    ("text", "doing"),
    [
        ("", "starting up"),
        (INFO + "Initializing a V1 LLM engine (v0.32.0) with config: ...\n", "starting workers"),
        (
            INFO + "Starting to load model /m...\n(Worker pid=1) WARNING 11-22 01:46:56 [a.py:1] slow\n",
            "loading the weights",
        ),
        (
            "model.safetensors:  12%|#         | 1G/8G\rmodel.safetensors:  40%|####      | 3G/8G",
            "model.safetensors:  40%|####      | 3G/8G",
        ),
        (INFO + "  ▄▄ ▄█ █\n" + INFO + "\n" + INFO + "Something of its own\n", "Something of its own"),
        ("01:15:52 INFO pdserve.cache touching the arena\n", "cache touching the arena"),
        ("2026-01-01 01:15:52.003 INFO cache[7] pdserve.cache touching the arena\n", "cache touching the arena"),
        ('{"time": "2026-11-22T05:00:01Z", "level": "INFO", "part": "pdserve.cache", "message": "touching it"}\n', "cache touching it"),
    ],
)
def test_doing(log: Path, text: str, doing: str) -> None:
    log.write_text(HEAD + text)
    assert logtail.doing(log) == doing


def test_cause_is_not_the_consequence(log: Path) -> None:
    log.write_text(
        HEAD
        + "Traceback (most recent call last):\n"
        + "(EngineCore pid=7) ERROR 11-22 01:46:48 [core.py:1] ValueError: no such weights\n"
        + "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
    )
    assert logtail.cause(log) == "ValueError: no such weights"
    log.write_text(HEAD + "all is well, errors: 0\n")
    assert logtail.cause(log) == ""


def test_only_the_newest_start_counts(log: Path) -> None:
    log.write_text(HEAD + "ValueError: of the first life\n" + HEAD + "second\n\n")
    assert logtail.tail(log) == ["second"]
    assert logtail.cause(log) == ""


def test_long_and_odd_logs(log: Path) -> None:
    assert logtail.tail(log) == []  # not there yet
    log.write_bytes(b"\xff\xfe\n" * 100_000 + b"last\n")
    assert logtail.tail(log, 2)[-1] == "last"


def test_lines_in_json_say_as_much_as_text(tmp_path: Path) -> None:
    def line(level: str, part: str, message: str, **more: str) -> str:
        told = {"time": "2026-11-22T05:00:01.250Z", "level": level, "process": "engine", "instance": "e", "pid": 1, "part": part}
        return json.dumps({**told, "request_id": None, "message": message, **more}) + "\n"

    file = tmp_path / "e.log"
    file.write_text(
        line("INFO", "vllm.v1.core", "Loading weights took 1.5 seconds") + line("WARNING", "vllm.config", "something is odd")
    )
    assert logtail.doing(file) == "making room for the KV cache"
    with file.open("a") as more:
        more.write(line("ERROR", "vllm.v1.engine.core", "EngineCore failed", exception="Traceback:\n  File x\nMemoryError: no room"))
        more.write(line("CRITICAL", "vllm", "ended by RuntimeError", exception="RuntimeError: Engine core initialization failed"))
    assert logtail.cause(file) == "MemoryError: no room"
    assert logtail.tail(file, 2) == ["CRITICAL 11-22 05:00:01 ended by RuntimeError", "RuntimeError: Engine core initialization failed"]

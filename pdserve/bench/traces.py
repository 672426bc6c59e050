"""Recorded requests without text: kv-cache-tester's conversations (one JSON file each, plain or gzip) and Mooncake's timed JSONL.

Both name the blocks of a prompt by hash ids: prompts that begin with the same ids begin with the same text. Read into plain
structs; what a replay makes of them is in workloads/trace_replay.py, what a simulation does in size/.
"""

from __future__ import annotations

import gzip
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.errors import ConfigError

MOONCAKE_BLOCK = 512
LIMIT = 1 << 30  # bytes of one unpacked file


@dataclass(frozen=True, slots=True)
class Call:
    """One request. `at`: seconds since its conversation began. `ids` name whole blocks from the prompt's start on."""

    at: float
    prompt_tokens: int
    output_tokens: int
    ids: array[int]
    took: float = 0.0  # as recorded, seconds
    think: float | None = None  # since the answer before, as recorded
    spawned: tuple[Spawn, ...] = ()  # sub-agents that were started after its answer


@dataclass(frozen=True, slots=True)
class Spawn:
    """A sub-agent: its own conversation, begun `delay` seconds after its parent's answer. `joined`: the parent waited for it."""

    delay: float
    calls: tuple[Call, ...]
    shared_tokens: int
    joined: bool = True
    ended: float = 0.0  # as recorded, on the parent's clock


@dataclass(frozen=True, slots=True)
class Trace:
    """One conversation, or one request of a timed trace (then `start` is when it arrived)."""

    name: str
    block_tokens: int
    calls: tuple[Call, ...]
    shared_tokens: int = 0  # of the beginning that other conversations of the same tool share: tools and system prompt
    start: float | None = None


def read(path: Path, block_tokens: int = 0) -> Iterator[Trace]:
    """Every trace of a folder in order of names, or of one file."""
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.name.endswith((".json", ".json.gz", ".jsonl", ".jsonl.gz")))
        if not files:
            raise ConfigError("--trace-directory", f"no .json, .json.gz or .jsonl in {path}")
    else:
        files = [path]
    for file in files:
        if ".jsonl" in file.name:
            yield from _mooncake(file, block_tokens or MOONCAKE_BLOCK)
        else:
            yield _conversation(file, block_tokens)


def all_calls(trace: Trace) -> Iterator[tuple[float, Call]]:
    """Every request with its recorded time since the conversation's start, sub-agents included, in no strict order."""
    yield from _timed(trace.calls, 0.0)


def _timed(calls: tuple[Call, ...], base: float) -> Iterator[tuple[float, Call]]:
    for call in calls:
        yield base + call.at, call
        for spawn in call.spawned:
            yield from _timed(spawn.calls, base + call.at + call.took + spawn.delay)


def _text(file: Path) -> str:
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as f:
            data = f.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise ConfigError("--trace-directory", f"{file} is over {LIMIT >> 20} MiB unpacked")
        return data.decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError("--trace-directory", f"{file} cannot be read: {error}") from error


def _conversation(file: Path, block_tokens: int) -> Trace:
    try:
        raw = json.loads(_text(file))
        block = block_tokens or int(raw["block_size"])
        calls = _calls(raw["requests"])
        shared = int(raw.get("tool_tokens") or 0) + int(raw.get("system_tokens") or 0)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{file} is no trace of kv-cache-tester ({type(error).__name__}: {error})"
        raise ConfigError("--trace-directory", problem) from error
    return Trace(file.name.split(".")[0], block, tuple(calls), shared)


def _calls(entries: list[dict[str, Any]]) -> list[Call]:
    """Plain requests in order, each with the sub-agents that began after it."""
    plain = sorted((e for e in entries if "requests" not in e), key=lambda e: float(e["t"]))
    agents = [e for e in entries if "requests" in e]
    begun: dict[int, list[Spawn]] = {}
    for agent in agents:
        start, end = _agent_times(agent)
        parent = max((i for i, e in enumerate(plain) if float(e["t"]) <= start), default=0)
        if not plain:
            continue
        answered = float(plain[parent]["t"]) + float(plain[parent].get("api_time") or 0.0)
        after = float(plain[parent + 1]["t"]) if parent + 1 < len(plain) else end
        shared = int(agent.get("tool_tokens") or 0) + int(agent.get("system_tokens") or 0)
        calls = tuple(_calls(agent["requests"]))
        if calls:
            begun.setdefault(parent, []).append(
                Spawn(max(0.0, start - answered), calls, shared, end <= after + 1.0, end)
            )
    return [
        Call(
            at=float(e["t"]),
            prompt_tokens=int(e["in"]),
            output_tokens=int(e["out"]),
            ids=array("q", e.get("hash_ids") or []),
            took=float(e.get("api_time") or 0.0),
            think=None if e.get("think_time") is None else float(e["think_time"]),
            spawned=tuple(begun.get(i, ())),
        )
        for i, e in enumerate(plain)
    ]


def _agent_times(agent: dict[str, Any]) -> tuple[float, float]:
    """(start, end) on the parent's clock. These traces note a sub-agent when it has ended: `t` is its end where it has a duration."""
    noted, lasted = float(agent["t"]), float(agent.get("duration_ms") or 0.0) / 1000
    return (noted - lasted, noted) if lasted and noted >= lasted else (noted, noted + lasted)


def _mooncake(file: Path, block: int) -> Iterator[Trace]:
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            at, length, out = float(row["timestamp"]) / 1000, int(row["input_length"]), int(row["output_length"])
            call = Call(0.0, length, max(1, out), array("q", row.get("hash_ids") or []))
        except (KeyError, TypeError, ValueError) as error:
            problem = f"line {number} of {file} is no timed request ({type(error).__name__}: {error})"
            raise ConfigError("--trace-directory", problem) from error
        yield Trace(f"{file.stem}-{number}", block, (call,), 0, at)

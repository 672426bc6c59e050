"""One benchmark's outcome as a file: everything that is needed to judge it and to run it again. Read back for compare and report."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from pdserve.bench.ramp import Period
from pdserve.bench.record import Record, write_csv
from pdserve.errors import ConfigError

FORMAT = 1


class Run(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One repetition of one arm."""

    arm: str
    repetition: int
    seconds: float
    stages: list[dict[str, Any]] = []
    lag_p99_ms: float = 0.0
    periods: list[Period] = []  # of a ramp
    carried_users: int | None = None
    facts: dict[str, Any] = {}  # what the arm's processes were started as, counters before and after


class Result(msgspec.Struct, kw_only=True, omit_defaults=True):
    format: int = FORMAT
    workload: str
    command: str
    started: str = ""
    seed: int
    parameters: dict[str, Any] = {}
    timeout: float
    slo: float | None = None
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    overhead: dict[str, float] = {}
    notes: list[str] = []  # what a reader must know before believing a figure
    runs: list[Run] = []
    records: list[Record] = []

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(run.arm for run in self.runs))

    def of(self, arm: str, repetition: int | None = None) -> list[Record]:
        return [r for r in self.records if r.arm == arm and repetition in (None, r.repetition)]


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def check_folder(folder: Path | None) -> None:
    """Before anything is measured: where results go can be written. It is made."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError("--out", f"{folder} cannot be written: {error.strerror}", "Name a folder.") from error


def write(result: Result, folder: Path, name: str = "") -> list[Path]:
    """NAME.json and NAME.csv in the folder; NAME is the workload's unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / (name or result.workload)
    files = [stem.with_suffix(".json"), stem.with_suffix(".csv")]
    files[0].write_bytes(msgspec.json.encode(result))
    write_csv(files[1], result.records)
    return files


def read(file: Path) -> Result:
    try:
        result = msgspec.json.decode(file.read_bytes(), type=Result)
    except OSError as error:
        raise ConfigError("", f"{file} cannot be read: {error}") from error
    except msgspec.DecodeError as error:
        raise ConfigError("", f"{file} is no result of pdserve bench: {error}") from error
    if result.format != FORMAT:
        raise ConfigError("", f"{file} has format {result.format}, this version reads {FORMAT}")
    return result


def read_folder(folder: Path) -> list[tuple[Path, Result]]:
    """Every result below the folder; other JSON files are left alone."""
    if not folder.is_dir():
        raise ConfigError("", f"{folder} is no folder", "Name the one that a run was given with --out DIR.")
    found = []
    for file in sorted(folder.rglob("*.json")):
        try:
            found.append((file, read(file)))
        except ConfigError:
            continue
    if not found:
        raise ConfigError("", f"no result of pdserve bench in {folder}", "Run one with --out DIR first.")
    return found

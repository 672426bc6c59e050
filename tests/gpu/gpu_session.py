"""What the steps of run_all.py share: the engines that they ask, the cache daemon, and the table of what was found."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
results: dict = {}
table: list[tuple[str, str]] = []
_file: list[Path] = []


def keep_in(file: Path) -> None:
    """From now on each figure is written there as it comes."""
    _file[:] = [file]


def row(what: str, figure: str) -> None:
    table.append((what, figure))
    print(f"## {what}: {figure}", flush=True)
    write()


def write() -> None:
    for file in _file:
        file.write_text(json.dumps({**results, "table": table}, indent=1))


class Engine:
    """One engine_probe.py. Every answer has a deadline; one that does not come ends the engine."""

    ports = 29500  # engines that start at the same moment would otherwise choose the same one
    START_S = 240.0
    shrink = 1  # prompts are so many times shorter

    def __init__(self, name: str, out: Path, **options) -> None:
        self.name = name
        self._log = (out / f"{name}.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "engine_probe.py"), json.dumps({"name": name, **options})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, "PYTHONSAFEPATH": "1", "VLLM_PORT": str(Engine.ports)},
        )  # fmt: skip
        Engine.ports += 100
        self._answers: queue.Queue[dict | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith("@@"):
                self._answers.put(json.loads(line[2:]))
            else:
                self._log.write(line)
        self._answers.put(None)

    def answer(self, seconds: float) -> dict:
        try:
            found = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.process.kill()
            raise RuntimeError(f"{self.name}: no answer within {seconds:.0f} s") from None
        if found is None:
            raise RuntimeError(f"engine {self.name} ended; see its log")
        if "error" in found:
            raise RuntimeError(f"{self.name}: {found['error']}")
        return found

    def ready(self) -> Engine:
        results[f"start_{self.name}_s"] = self.answer(self.START_S)["ready"]
        write()
        return self

    def do(self, name: str, seconds: float = 60, **arguments) -> dict:
        if arguments.get("n"):
            arguments["n"] = max(32, arguments["n"] // Engine.shrink)
        self.process.stdin.write(json.dumps({"do": name, **arguments}) + "\n")
        self.process.stdin.flush()
        return self.answer(seconds)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()


def daemon(name: str, size: str, port: int, out: Path) -> tuple[subprocess.Popen, str]:
    socket = f"/tmp/pdserve-{name}.sock"
    log = (out / f"cache-{name}.log").open("w")
    command = [sys.executable, "-m", "pdserve", "cache", "serve", "--socket", socket, "--size", size]
    process = subprocess.Popen(
        [*command, "--admin-port", str(port), "--name", name],
        stdout=log,
        stderr=log,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    end = time.monotonic() + 90
    while not Path(socket).exists():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the cache daemon did not start; see {log.name}")
        time.sleep(0.2)
    return process, socket


@dataclass
class Run:
    out: Path
    model: str
    small: str | None
    socket: str
    until: float
    rounds: int = 5
    more: dict = field(default_factory=dict)  # arguments for vLLM
    null: bool = False  # whether an engine with a connector that does nothing is wanted, too
    started: dict[str, Engine] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return max(1.0, self.until - time.monotonic())

    @property
    def big(self) -> dict:
        # 24 prompts of 4000 tokens take 13.4 GiB; three such engines fit on the GPU.
        return {"model": self.model, "kv_gib": 18, "engine": self.more}

    def engines(self, *named: tuple[str, dict]) -> list[Engine]:
        """Started side by side."""
        made = [Engine(name, self.out, **options) for name, options in named]
        self.started |= {e.name: e for e in made}
        return [e.ready() for e in made]

    def engine(self, name: str, **options) -> Engine:
        return self.engines((name, options))[0]

    def ours(self) -> Engine:
        """Our engine, of a pair that was started before, or alone."""
        if "pdserve" not in self.started:
            self.engine("pdserve", connector=True, socket=self.socket, **self.big)
        return self.started["pdserve"]

    def pair(self) -> tuple[Engine, Engine]:
        """Ours and the plain one, started by the step that needs them first; with them the null one, where it will be asked."""
        if "plain" not in self.started:
            named: list[tuple[str, dict]] = [("plain", self.big), *([("null", {"peer": "null", **self.big})] if self.null else [])]
            if "pdserve" not in self.started:
                named.insert(0, ("pdserve", {"connector": True, "socket": self.socket, **self.big}))
            self.engines(*named)
        return self.started["pdserve"], self.started["plain"]

    def end_pair(self) -> None:
        for name in ("pdserve", "plain", "null"):
            if name in self.started:
                self.started.pop(name).stop()

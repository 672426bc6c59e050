"""The `pdserve` command as a user meets it: bad input is one line and exit code 2; a deployment of fake engines lives and dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from ports import free_port

from pdserve.deploy.backends.local import kill_all, marked

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT = 180.0
PORTS = ("PREFILL", "DECODE", "ADMIN", "PROXY")
FAKE = """
name: NAME
model: demo
engine: {kind: fake, device: cpu}
prefill: [{port: PREFILL}]
decode: [{port: DECODE}]
cache: {size: 64MiB, admin_port: ADMIN}
proxy: {port: PROXY}
"""


class Cli:
    """pdserve with a home and a run directory of its own."""

    def __init__(self, base: Path, runs: Path) -> None:
        self.base, self.runs = base, runs
        self.env = {**os.environ, "PDSERVE_HOME": str(base / "home"), "PDSERVE_RUN_DIR": str(self.runs)}
        self.name = f"t{os.getpid()}"

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-P", "-m", "pdserve", *words]

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = self.command(*words)
        return subprocess.run(
            command, env=self.env, cwd=self.base, capture_output=True, text=True, timeout=WAIT, check=False
        )

    def file(self, text: str = FAKE) -> str:
        """A topology with free ports; the demo model is there as far as anyone looks."""
        for word in PORTS:
            text = text.replace(word, str(free_port()))
        path = self.base / "t.yaml"
        path.write_text(text.replace("NAME", self.name).replace("model: demo", f"model: {self.model()}"))
        return str(path)

    def model(self) -> Path:
        folder = self.base / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        return folder

    def status(self) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self("status", self.name, "--json").stdout)
        return found[0]


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    # pytest's folders are too long for a unix socket.
    with tempfile.TemporaryDirectory(prefix="pds-") as runs:
        made = Cli(tmp_path, Path(runs) / "run")
        yield made
        if made.runs.exists():
            made("stop", "--all")
        left = marked(str(made.runs / made.name))
        kill_all(left)
    assert not left, "processes outlived the test"
    assert not Path(f"/dev/shm/pdserve-{made.name}.arena").exists()


def refused(cli: Cli, path: str, *more: str) -> str:
    done = cli("launch", path, *more)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("pdserve: ")
    assert not marked(str(cli.runs / cli.name))
    return done.stderr


BAD: list[tuple[str, Callable[[str], str], str]] = [
    (
        "wrong type",
        lambda t: t.replace("port: DECODE", "port: many"),
        "decode[0].port: 'many' is text. Give an integer.",
    ),
    ("unknown key", lambda t: t.replace("device:", "devise:"), "engine.devise: unknown key. Did you mean 'device'?"),
    ("one port twice", lambda t: t.replace("DECODE", "PREFILL"), "is used by prefill[0]"),
    ("no producers", lambda t: t.replace("prefill: [{port: PREFILL}]", ""), "prefill: no producer is listed"),
    ("no model folder", lambda t: t.replace("model: demo", "model: ./absent"), "model: './absent' is neither a folder"),
    ("no config.json", lambda t: t.replace("model: demo", "model: /tmp"), "/tmp holds no config.json"),
    ("arena too large", lambda t: t.replace("64MiB", "900TiB"), "cache.size: 921600.0 GiB does not fit in /dev/shm"),
    ("not YAML", lambda t: t + "]", "not valid YAML: line"),
    (
        "no such core",
        lambda t: t.replace("port: DECODE", "port: DECODE, cpus: 4095"),
        "decode[0].cpus: '4095' names core",
    ),
    ("wrong vLLM", lambda t: t.replace("kind: fake, device: cpu", "device: cuda"), "device: cuda, but"),
]


@pytest.mark.parametrize(("what", "spoil", "message"), BAD, ids=[case[0] for case in BAD])
def test_bad_input(cli: Cli, what: str, spoil: Callable[[str], str], message: str) -> None:
    """In the foreground and detached; side by side, since each takes a second of one core to start."""
    path = cli.file(spoil(FAKE))
    with ThreadPoolExecutor(2) as pool:
        for said in pool.map(lambda more: refused(cli, path, *more), ((), ("--detach",))):
            assert message in said


def test_port_in_use(cli: Cli) -> None:
    path = cli.file()
    with socket.socket() as taken:
        port = int(Path(path).read_text().split("prefill: [{port: ")[1].split("}")[0])
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert f"prefill[0].port: {port} cannot be used: Address already in use (pid" in refused(cli, path)


def test_unknown_file_and_unknown_words(cli: Cli) -> None:
    assert "absent.yaml: no such topology file" in refused(cli, "absent.yaml")
    for words in (
        ["lunch"],
        ["launch"],
        ["cache", "serve", "--socket", "s", "--size", "much"],
        ["model", "fetch", "x"],
    ):
        done = cli(*words)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


def test_help_of_every_command(cli: Cli) -> None:
    from pdserve.__main__ import COMMANDS

    assert "exit codes:" in cli("--help").stdout
    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(lambda name: cli(name, "--help"), COMMANDS))
    for name, done in zip(COMMANDS, told, strict=True):
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: pdserve {name}")


def test_dry_run_starts_nothing_and_says_everything(cli: Cli) -> None:
    path = cli.file()
    done = cli("launch", path, "--dry-run")
    assert done.returncode == 0
    assert next(line for line in done.stdout.splitlines() if line.startswith("# ")).startswith(
        f"# {cli.name}: 4 processes"
    )
    facts = json.loads(cli("launch", path, "--dry-run", "--json").stdout)
    assert [process["name"] for process in facts["processes"]] == ["cache", "prefill-0", "decode-0", "proxy"]
    assert not cli.runs.exists()
    # It needs none of the hardware that it plans for.
    assert cli("launch", "gpu-2p2d-tp2", "--dry-run").returncode == 0


def test_a_deployment_lives_and_dies(cli: Cli) -> None:
    path = cli.file()
    done = cli("launch", path, "--detach", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["state"] == "ready"

    status = cli.status()
    assert [(r["name"], r["state"], r["answers"]) for r in status["processes"]] == [
        (name, "ready", True) for name in ("cache", "prefill-0", "decode-0", "proxy")
    ]
    assert all({"role", "pid", "url", "restarts", "since"} <= set(record) for record in status["processes"])
    assert cli("status", path).returncode == 0  # by its file as well

    assert "is running already (supervisor pid" in refused_again(cli, path)

    pids = [record["pid"] for record in status["processes"]]
    done = cli("stop", cli.name)
    assert (done.returncode, done.stdout) == (0, f"{cli.name}: stopped\n")
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    done = cli("status", cli.name)
    assert done.returncode == 1
    assert "stopped" in done.stdout
    assert cli("stop", cli.name).stdout == f"{cli.name}: was not running\n"
    assert cli("status").stdout == "Nothing is running.\n"


def refused_again(cli: Cli, path: str) -> str:
    done = cli("launch", path)
    assert done.returncode == 2
    return done.stderr


def test_after_kill_of_the_supervisor(cli: Cli) -> None:
    path = cli.file()
    assert cli("launch", path, "--detach").returncode == 0
    status = cli.status()
    os.kill(status["pid"], signal.SIGKILL)
    until(lambda: not psutil.pid_exists(status["pid"]))
    assert cli("status", cli.name).returncode == 1
    # The next launch cleans up by itself.
    done = cli("launch", path, "--detach")
    assert done.returncode == 0, done.stderr
    fresh = cli.status()
    assert fresh["state"] == "ready"
    assert not {r["pid"] for r in fresh["processes"]} & {r["pid"] for r in status["processes"]}


def test_a_launch_that_fails_says_why(cli: Cli) -> None:
    path = cli.file(FAKE.replace("port: DECODE", "port: DECODE, extra_args: [--no-such-flag]"))
    for more in ((), ("--detach",)):
        done = cli("launch", path, *more)
        assert done.returncode == 1
        assert "pdserve: decode-0 could not start: exited with code 2" in done.stderr
        assert "unrecognized arguments: --no-such-flag" in done.stderr
        assert not marked(str(cli.runs / cli.name))


def test_ctrl_c_in_the_foreground(cli: Cli) -> None:
    with subprocess.Popen(
        cli.command("launch", cli.file()), env=cli.env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        assert "is ready: http://127.0.0.1:" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == 0
    assert not marked(str(cli.runs / cli.name))
    assert cli.status()["state"] == "stopped"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)

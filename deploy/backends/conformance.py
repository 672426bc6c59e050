"""What every backend must do, one function per rule, with real processes. An outside backend runs it too:

    @pytest.mark.parametrize("rule", conformance.RULES, ids=lambda rule: rule.__name__)
    def test_rule(rule, tmp_path):
        rule(MyBackend(), tmp_path)

Rules end what they start. Waits have a bound that is far above what a well backend needs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pdserve.deploy.backends.base import Backend, Handle
from pdserve.deploy.plan import Process
from pdserve.errors import StartError

PATIENCE_S = 30.0
_CHILD = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
SLEEP = _CHILD + "print('up', flush=True); time.sleep(600)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEP
LEAVE = _CHILD + "print('up', flush=True); sys.exit(5)"


def process(folder: Path, code: str, name: str = "one", **env: str) -> Process:
    return Process(
        name=name,
        role="both",
        argv=(sys.executable, "-c", code),
        env=env,
        url="http://127.0.0.1:1",
        ready_url="http://127.0.0.1:1/health",
        log=folder / "logs" / f"{name}.log",
        cwd=folder,
    )


def soon(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def started(backend: Backend, folder: Path, code: str) -> Handle:
    handle = backend.start(process(folder, code))
    log = folder / "logs" / "one.log"
    soon(lambda: "\nup" in log.read_text(), "output must reach the log while the process runs")
    return handle


def finish(backend: Backend, handle: Handle) -> None:
    soon(lambda: backend.exit_code(handle) is not None, "it ends by itself")
    backend.kill(handle)


def runs_until_killed_with_its_children(backend: Backend, folder: Path) -> None:
    handle = started(backend, folder, SLEEP)
    assert handle.name == "one"
    assert backend.exit_code(handle) is None, "a running process has no exit code"
    assert len(backend.remains(handle)) == 2, "the process and its child are there"
    backend.kill(handle)
    assert backend.remains(handle) == [], "kill ends the children too, before it returns"
    code = backend.exit_code(handle)
    assert code is not None
    assert code < 0, "ended by a signal: a negative code"


def ends_in_its_own_way_when_interrupted(backend: Backend, folder: Path) -> None:
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(9)); " + SLEEP
    handle = started(backend, folder, code)
    backend.interrupt(handle)
    soon(lambda: backend.exit_code(handle) is not None, "an interrupted process ends")
    assert backend.exit_code(handle) == 9, "its own exit code is kept"
    backend.kill(handle)


def kills_what_does_not_listen(backend: Backend, folder: Path) -> None:
    handle = started(backend, folder, DEAF)
    backend.interrupt(handle)
    backend.kill(handle)
    assert backend.remains(handle) == []


def finds_children_of_the_dead(backend: Backend, folder: Path) -> None:
    handle = started(backend, folder, LEAVE)
    soon(lambda: backend.exit_code(handle) is not None, "it leaves by itself")
    assert backend.exit_code(handle) == 5
    assert len(backend.remains(handle)) == 1, "its child outlived it and is still known"
    backend.kill(handle)
    assert backend.remains(handle) == []


def says_nothing_about_the_gone(backend: Backend, folder: Path) -> None:
    handle = started(backend, folder, SLEEP)
    backend.kill(handle)
    backend.interrupt(handle)
    backend.kill(handle)
    assert backend.exit_code(handle) is not None
    assert backend.remains(handle) == []


def gives_the_environment_and_the_folder(backend: Backend, folder: Path) -> None:
    code = "import os, time; print('\\nup', os.environ['MINE'], os.getcwd(), flush=True)"
    finish(backend, backend.start(process(folder, code, MINE="yes")))
    assert f"up yes {folder}" in (folder / "logs" / "one.log").read_text()


def appends_to_the_log(backend: Backend, folder: Path) -> None:
    for _ in range(2):
        finish(backend, backend.start(process(folder, "print('\\nonce')")))
    assert (folder / "logs" / "one.log").read_text().count("\nonce\n") == 2, "the log of the start before is kept"


def says_when_a_command_cannot_be_run(backend: Backend, folder: Path) -> None:
    said = ""
    try:
        backend.start(replace(process(folder, ""), argv=("/no/such/command",)))
    except StartError as error:
        said = str(error)
    assert "/no/such/command" in said, "StartError is due, and it names the command"


RULES: tuple[Callable[[Backend, Path], None], ...] = (
    runs_until_killed_with_its_children,
    ends_in_its_own_way_when_interrupted,
    kills_what_does_not_listen,
    finds_children_of_the_dead,
    says_nothing_about_the_gone,
    gives_the_environment_and_the_folder,
    appends_to_the_log,
    says_when_a_command_cannot_be_run,
)

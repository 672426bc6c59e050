"""What `make test` makes of a test that fails: a second try with a deadline of its own, and nothing of the first is lost."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = """
import time, pytest
tries = []

@pytest.fixture(scope="module")
def engine():
    tries.append("engine")
    yield tries
    print("the engine is stopped")

def test_by_chance(engine):
    print("said in the first try")
    engine.append("chance")
    assert engine.count("chance") > 1, "not this time"

def test_for_good(engine):
    assert engine.count("engine") == 1, "the module's fixture was made again"
    assert False, "never"

@pytest.mark.timeout(1)
def test_that_hangs_the_second_time(engine):
    engine.append("hangs")
    assert engine.count("hangs") > 1, "first"
    time.sleep(60)

def test_well():
    pass
"""


INTERRUPTED = """
import pytest
from pathlib import Path

@pytest.fixture(scope="session")
def engine():
    yield []
    Path("stopped").touch()

def test_some(engine):
    engine.append(1)
    if len(engine) > 1:
        raise KeyboardInterrupt
    assert False
"""


def words() -> list[str]:
    """As the Makefile has them."""
    (line,) = re.findall(r"^\t@\$\(BIN\)/pytest (.*--reruns.*?)(?: \|\|.*)?$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return shlex.split(line.replace("$(RERUNS)", "1"))


def run(tmp_path: Path, tests: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "test_some.py").write_text(tests)
    command = [sys.executable, "-P", "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    command += ["-p", "reruns", "-p", "no:cacheprovider", str(tmp_path), *words()]
    environment = {"PYTHONPATH": str(ROOT / "tests" / "support"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment, cwd=tmp_path)


def test_a_failed_test_is_tried_once_more_and_told_of(tmp_path: Path) -> None:
    done = run(tmp_path, TESTS)
    text = done.stdout
    assert done.returncode == 1, text + done.stderr
    assert "2 failed, 2 passed, 3 rerun in" in text.splitlines()[-1], text
    assert text.count("RERUN test_some.py::test_by_chance") == 1, text
    first = text[text.index("a defect to mend") :]
    assert "not this time" in first
    assert "said in the first try" in first
    assert "Timeout (>1.0s)" in text
    assert "AssertionError: never" in text
    assert "AssertionError: the module's fixture" not in text


def test_interrupted_in_a_second_try_nothing_is_left_running(tmp_path: Path) -> None:
    done = run(tmp_path, INTERRUPTED)
    assert done.returncode == 2, done.stdout + done.stderr
    assert (tmp_path / "stopped").exists(), "the session's fixture was not ended"

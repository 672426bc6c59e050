"""One style for every command: walks over all parsers, so that a new command is checked without a new test."""

from __future__ import annotations

import argparse
import io
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pdserve import __main__ as command
from pdserve import cli_completion, cli_reference, cli_status, cli_tree, errors, output

ROOT = Path(__file__).resolve().parents[2]
PARSERS = {parser.prog: parser for parser in cli_tree.walk(cli_tree.whole())}
# What prints no data: a process that serves, or a text that is itself made for programs.
NO_JSON = {"pdserve proxy", "pdserve cache serve", "pdserve completion", "pdserve topology schema"}
WIDTH = 80


def below(parser: argparse.ArgumentParser) -> bool:
    return any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)


def ends() -> list[str]:
    """The commands that do something themselves."""
    return [prog for prog, parser in PARSERS.items() if not below(parser)]


@pytest.mark.parametrize("prog", PARSERS)
def test_help_has_examples_and_a_word_on_everything(prog: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    parser = PARSERS[prog]
    text = parser.format_help()
    assert re.search(r"^examples?:", text, re.MULTILINE), f"{prog} --help has no examples"
    assert prog in (parser.epilog or ""), f"the examples of {prog} do not show it"
    silent = [a.dest for a in parser._actions if a.help is None and not isinstance(a, argparse._SubParsersAction)]
    assert not silent, f"{prog}: no help for {silent}"
    own = [line for line in text.replace(parser.epilog or "", "").splitlines() if len(line) > WIDTH]
    assert not own, own


@pytest.mark.parametrize("prog", sorted(set(ends()) - NO_JSON))
def test_what_prints_data_prints_it_for_programs(prog: str) -> None:
    assert "--json" in PARSERS[prog]._option_string_actions, f"{prog} has no --json"


def test_the_exceptions_exist() -> None:
    assert set(ends()) >= NO_JSON


def test_every_error_has_a_documented_exit_code() -> None:
    def kinds(of: type[errors.PdserveError]) -> list[type[errors.PdserveError]]:
        return [of, *(below for kind in of.__subclasses__() for below in kinds(kind))]

    assert {kind.exit_code for kind in kinds(errors.PdserveError)} <= set(cli_tree.EXIT_CODES)
    listed = cli_tree.epilog()
    assert all(f"  {code:<4} {text}" in listed for code, text in cli_tree.EXIT_CODES.items())


NOBODY = (
    ["status", "absent"],
    ["bench", "quick", "absent"],
    ["cache", "status", "--admin-port", "1"],
    ["doctor", "http://127.0.0.1:1"],
    ["explain", "some-id", "--url", "http://127.0.0.1:1"],
)


@pytest.mark.parametrize("words", NOBODY, ids=lambda words: words[0])
def test_exit_code_3_when_nobody_answers(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PDSERVE_RUN_DIR", str(tmp_path))
    assert command.main(words) == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1


def test_the_committed_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    assert (ROOT / "docs" / "cli.md").read_text() == cli_reference.page(), "run `make docs-generate`"


# --- completion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", cli_completion.SHELLS)
def test_completion_knows_every_command_and_parses(shell: str, tmp_path: Path) -> None:
    script = cli_completion.script(shell)
    for name in cli_tree.COMMANDS:
        assert name in script
    assert "local-cpu" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    file = tmp_path / "script"
    file.write_text(script)
    done = subprocess.run([shell, "-n", str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_completes(tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    file = tmp_path / "script"
    file.write_text(cli_completion.script("bash"))
    for words, wanted in (("pdserve doc", "doctor"), ("pdserve launch local-cpu-b", "local-cpu-both")):
        ask = (
            f"source {file}; COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}; COMP_LINE='{words}'; "
            "COMP_POINT=${#COMP_LINE}; _shtab_pdserve; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=60, check=False)
        assert wanted in done.stdout.split(), (done.stdout, done.stderr)


# --- output -------------------------------------------------------------------------------------------------------


def test_tables_fit_and_lose_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("decode-0", 4_194_304, "127.0.0.1:8200", "restarting", "word " * 30 + "end", "x" * 90)]
    output.table(("process", "pid", "address", "state", "why", "path"), rows, right=("pid",))
    out = capsys.readouterr().out
    assert all(len(line) <= WIDTH for line in out.splitlines())
    assert out.count("word") == 30
    assert out.count("x") == 90
    output.table(("", ""), [("a", 1)])
    assert capsys.readouterr().out.split() == ["a", "1"]


def test_status_fits(capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "name": "prefill-10",
        "pid": 4_194_304,
        "url": "http://192.168.100.200:65535",
        "state": "restarting",
        "restarts": 12,
        "since": time.time() - 7000,
        "detail": "was killed by SIGKILL; again in 30 s",
    }
    cli_status._print_processes([record] * 3, time.time())
    out = capsys.readouterr().out
    assert all(len(line) <= WIDTH for line in out.splitlines()), out
    assert "192.168.100.200:65535" in out
    assert out.count("was killed by SIGKILL") == 3


PROGRESS = """
import sys, time
from pdserve import output
with output.steps(total=2, stream=sys.stdout) as progress:
    progress.step("halfway", 1)
    time.sleep(0.3)
output.table(("state",), [("failed",)])
"""


def on_a_terminal(code: str, **variables: str) -> str:
    """What a program writes when its output is a terminal."""
    main, side = pty.openpty()
    try:
        environment = {**os.environ, "TERM": "xterm-256color", **variables}
        environment = {key: value for key, value in environment.items() if value}
        with subprocess.Popen([sys.executable, "-P", "-c", code], stdout=side, env=environment) as process:
            os.close(side)
            return _read_all(main, process)
    finally:
        os.close(main)


def _read_all(main: int, process: subprocess.Popen[bytes]) -> str:
    said = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([main], [], [], 0.1)[0]:
            if process.poll() is not None:
                break
            continue
        try:
            piece = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        said += piece
    process.wait(10)
    return said.decode()


def test_progress_only_on_a_terminal_and_no_colour_when_asked() -> None:
    colour = re.compile(r"\x1b\[[\d;]*(3[1-7]|9[1-7]|38;5)[\d;]*m")
    shown = on_a_terminal(PROGRESS, NO_COLOR="")
    assert "halfway" in shown
    assert colour.search(shown)
    plain = on_a_terminal(PROGRESS, NO_COLOR="1")
    assert "halfway" in plain
    assert "failed" in plain
    assert not colour.search(plain)
    piped = subprocess.run(
        [sys.executable, "-P", "-c", PROGRESS], capture_output=True, text=True, timeout=60, check=False
    )
    assert piped.stdout.split() == ["state", "failed"]
    assert "\x1b" not in piped.stdout


def test_a_plain_line_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said while the work is one long call, too."""
    monkeypatch.setattr(output, "FIRST_LINE_S", 0.01)
    monkeypatch.setattr(output, "LINE_EVERY_S", 0.01)
    told, lines = threading.Event(), list[str]()

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            lines.append(text)
            if len(lines) >= 2:
                told.set()
            return len(text)

    with output.steps(total=4, stream=Stream()) as progress:
        progress.step("halfway", 2)
        assert told.wait(60)
    assert all(re.fullmatch(r"halfway, 2 of 4 done, \d+ s\n|working, \d+ s\n", line) for line in lines), lines
    assert lines[-1].startswith("halfway")
    assert not any(thread.name == "progress" for thread in threading.enumerate())

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdserve import cli_logs, logs
from pdserve.deploy import state
from pdserve.logs import Line, Reader

DAY = time.strftime("%Y-%m-%d")
VLLM = time.strftime("%m-%d")
OURS = f"{DAY} 05:00:01.250 INFO engine:prefill-0[7] pdserve.connector stored 5 tokens request_id=cmpl-rid-0-aa\n"


def lines(folder: Path, **files: str) -> list[Line]:
    for name, text in files.items():
        (folder / f"{name}.log").write_text(text)
    readers = [Reader(path, path.stem, "x") for path in sorted(folder.glob("*.log"))]
    found = list(logs.merged(readers))
    for reader in readers:
        reader.close()
    return found


def test_lines_of_all_forms_in_order_of_time(tmp_path: Path) -> None:
    in_json = {"time": logs.log.utc(at("05:00:01.100")), "level": "WARNING", "process": "proxy", "instance": "proxy", "pid": 3,
               "part": "pdserve.proxy", "request_id": "rid", "message": "request rid: late"}  # fmt: skip
    found = lines(
        tmp_path,
        prefill=f"--- pdserve: {DAY} 04:59:59 vllm serve m\n"
        f"(EngineCore pid=9) INFO {VLLM} 05:00:00 [core.py:1] ready\n" + OURS,
        proxy=json.dumps(in_json) + "\n{not json\n",
        cache=f"{DAY} 05:00:02.000 ERROR cache:c[8] pdserve.cache bad\nTraceback (most recent call last):\n  File x\n",
    )
    assert [(line.instance, line.message) for line in found] == [
        ("prefill", "started: vllm serve m"),
        ("prefill", "EngineCore [core.py:1] ready"),
        ("proxy", "pdserve.proxy request rid: late"),
        ("proxy", "{not json"),
        ("prefill", "pdserve.connector stored 5 tokens request_id=cmpl-rid-0-aa"),
        ("cache", "pdserve.cache bad"),
        ("cache", "Traceback (most recent call last):"),
        ("cache", "  File x"),
    ]
    assert [line.own for line in found] == [True, True, True, False, True, True, False, False]
    assert [line.pid for line in found[:3]] == [None, 9, 3]
    assert [line.request_id for line in found][2::2] == ["rid", "cmpl-rid-0-aa", None]
    assert found[-1].level == "ERROR"


def at(text: str) -> float:
    whole, _, millis = text.partition(".")
    return time.mktime(time.strptime(f"{DAY} {whole}", "%Y-%m-%d %H:%M:%S")) + int(millis or 0) / 1000


def test_only_lines_about_a_request_with_what_belongs_to_them(tmp_path: Path) -> None:
    found = lines(
        tmp_path,
        a=OURS
        + "Traceback\n"
        + '(APIServer pid=1) INFO:     127.0.0.1:1 - "GET /health HTTP/1.1" 200 OK\n'
        + OURS.replace("rid", "ridge"),
        b=f"{DAY} 05:00:01.300 INFO proxy[7] pdserve.proxy request rid: x\n{DAY} 05:00:01.400 INFO proxy[7] pdserve.proxy y\n",
    )
    about = list(logs.about(found, "rid"))
    assert [line.message.split()[-1] for line in about] == ["request_id=cmpl-rid-0-aa", "Traceback", "x"]
    assert list(logs.about(found, "nobody")) == []


def test_lines_of_a_launch_count_from_its_start(tmp_path: Path) -> None:
    (tmp_path / "supervisor.log").write_text("[   15 s] decode-0   ...        loading\n")
    reader = Reader(tmp_path / "supervisor.log", "supervisor", "supervisor", 1000.0)
    (line,) = reader.new()
    assert (line.at, line.message) == (1015.0, "decode-0   ...        loading")
    reader.close()


def test_a_file_is_followed_through_cuts_and_replacements(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    reader = Reader(path, "a", "x")
    assert list(reader.new()) == []
    path.write_text("one\ntwo")
    assert [line.message for line in reader.new()] == ["one"]
    with path.open("a") as file:
        file.write(" and a half\n")
    assert [line.message for line in reader.new()] == ["two and a half"]
    path.rename(tmp_path / "a.log.1")
    path.write_text("new file\n")
    assert [line.message for line in reader.new()] == ["new file"]
    path.write_text("cut\n")
    assert [line.message for line in reader.new()] == ["cut"]
    path.unlink()
    assert list(reader.new()) == []
    later = Reader(path, "a", "x")
    path.write_text("old\n")
    later.to_end()
    assert list(later.new()) == []
    reader.close()
    later.close()


def test_a_line_without_an_end_does_not_fill_memory(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(b"x" * (5 << 20))
    reader = Reader(tmp_path / "a.log", "a", "x")
    found = list(reader.new())
    assert found
    assert all(len(line.message) <= logs.MOST_LINE for line in found)
    assert len(reader._rest) <= logs.MOST_LINE
    reader.close()


@pytest.mark.parametrize(("text", "ago"), [("30s", 30), ("10m", 600), ("1.5h", 5400), ("2d", 172800)])
def test_since_a_span(text: str, ago: float) -> None:
    assert logs.since(text, 1e9) == 1e9 - ago


def test_since_a_time() -> None:
    assert logs.since("05:00:01", at("12:00:00")) == at("05:00:01")
    assert logs.since("05:00", at("12:00:00")) == at("05:00:00")
    assert logs.since(f"{DAY}T05:00:01", 0.0) == at("05:00:01")
    with pytest.raises(ValueError, match="neither a span"):
        logs.since("yesterday", 0.0)


@pytest.fixture
def deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PDSERVE_RUN_DIR", str(tmp_path))
    folder = tmp_path / "mine" / "logs"
    folder.mkdir(parents=True)
    made = state.Deployment("mine", str(tmp_path / "mine"), "", "", "http://x", 1, 0.0, time.time(), state="stopped")
    (tmp_path / "mine" / state.FILE).write_bytes(msgspec.json.encode(made))
    return folder


def run(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "pdserve", "logs", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **more)


def test_the_command(deployment: Path) -> None:
    (deployment / "prefill-0.log").write_text(OURS)
    (deployment / "proxy.log").write_text(f"{DAY} 05:00:00.000 WARNING proxy[7] pdserve.proxy request rid: x\n")
    done = run("mine")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert re.fullmatch(r"\d\d-\d\d 05:00:00\.000 proxy     WARNING pdserve\.proxy request rid: x", first)
    assert second.endswith("stored 5 tokens request_id=cmpl-rid-0-aa")
    assert "\x1b" not in done.stdout
    told = [json.loads(line) for line in run("--json", "--request", "rid").stdout.splitlines()]
    assert [(line["instance"], line["request_id"]) for line in told] == [
        ("proxy", "rid"),
        ("prefill-0", "cmpl-rid-0-aa"),
    ]
    assert len(run("--since", "05:00:01").stdout.splitlines()) == 1
    assert run("nobody").returncode == 3
    assert run("--since", "soon").returncode == 2


def test_following_through_a_new_process(deployment: Path) -> None:
    (deployment / "a.log").write_text("before\n")
    command = [sys.executable, "-P", "-m", "pdserve", "logs", "-f", "mine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith("before\n")
        (deployment / "b.log").write_text("from another\n")
        assert process.stdout.readline().endswith("from another\n")
        process.terminate()
        process.wait(20)


def test_colours_only_on_a_terminal() -> None:
    class Terminal:
        text = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            pass

    stream: Any = Terminal()
    cli_logs.Printer(stream, False, ["a"]).all([Line(0.0, True, "ERROR", "x", "a", None, None, "bad")])
    assert "\x1b[31mbad" in stream.text

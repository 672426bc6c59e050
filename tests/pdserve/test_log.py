from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pdserve import log
from pdserve.errors import ConfigError


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    root = logging.getLogger("pdserve")
    before = (root.level, root.propagate, list(root.handlers))
    yield
    root.setLevel(before[0])
    root.propagate, root.handlers[:] = before[1], before[2]


def said(form: str | None = None, process: str = "engine", instance: str = "prefill-0") -> str:
    stream = io.StringIO()
    log.setup(process, instance, form, stream)
    log.get("connector").info("retrieved %d tokens request_id=%s", 5, "cmpl-a-0-0123abcd")
    log.get("proxy").warning("request %s: it broke\nin two", "my-id")
    try:
        raise ValueError("no")
    except ValueError:
        log.get("proxy").exception("bad")
    return stream.getvalue()


def test_text_lines_have_time_level_process_instance_and_part() -> None:
    first = said().splitlines()[0]
    found = log.HEAD.match(first)
    assert found is not None
    assert (found["level"], found["process"], found["instance"], found["part"]) == (
        "INFO", "engine", "prefill-0", "pdserve.connector",
    )  # fmt: skip
    assert first.endswith(" retrieved 5 tokens request_id=cmpl-a-0-0123abcd")
    own = log.HEAD.match(said(process="proxy", instance="").splitlines()[0])
    assert own is not None
    assert (own["process"], own["instance"]) == (None, "proxy")


def test_json_lines_are_one_object_each() -> None:
    lines = [json.loads(line) for line in said("json").splitlines()]
    assert [line["request_id"] for line in lines] == ["a", "my-id", None]
    assert {(line["process"], line["instance"]) for line in lines} == {("engine", "prefill-0")}
    assert lines[0].keys() == {"time", "level", "process", "instance", "pid", "part", "request_id", "message"}
    assert lines[0]["time"].endswith("Z")
    assert "ValueError: no" in lines[2]["exception"]


def test_the_environment_says_the_form_and_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_LOG_FORMAT", "json")
    assert said().startswith("{")
    assert not said("text").startswith("{")
    monkeypatch.setenv("PDSERVE_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match="no form of log lines"):
        said()


def test_utc() -> None:
    assert log.utc(0.9996) == "1970-01-01T00:00:01.000Z"


def test_a_proxy_that_was_asked_for_json_writes_nothing_else() -> None:
    words = ["proxy", "--decode", "http://127.0.0.1:9", "--port", "0", "--log-format", "json"]
    command = [sys.executable, "-P", "-m", "pdserve", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = json.loads(process.stderr.readline())
        process.terminate()
        rest = [json.loads(line) for line in process.stderr.read().splitlines()]
        process.wait(30)
    assert "listening on http://127.0.0.1:" in first["message"]
    assert {(line["process"], line["instance"]) for line in [first, *rest]} == {("proxy", "proxy")}

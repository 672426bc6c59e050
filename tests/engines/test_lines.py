"""vLLM's log lines as JSON, in a process that configures its logging as vLLM does."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from pdserve.engines.vllm import lines

AS_VLLM_DOES = """
import json, logging, logging.config, os, warnings
with open(os.environ["VLLM_LOGGING_CONFIG_PATH"]) as file:
    config = json.load(file)
logging.config.dictConfig(config)
logging.config.dictConfig(config)  # uvicorn is given it, too
logger = logging.getLogger("vllm.v1.engine.async_llm")
logger.debug("not shown")
logger.info("Added request %s.", "chatcmpl-my-id-0123abcd")
logger.warning("two lines\\nof one message")
logger.info("Aborted request(s) %s.", "cmpl-one-0-0123abcd,cmpl-two-0-0123abcd")
logging.getLogger("uvicorn.access").info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:1", "POST", "/v1/completions", "1.1", 200)
logging.getLogger("uvicorn.error").info("Application startup complete.")
logging.getLogger("transformers").warning("an old tokenizer")
logging.getLogger("transformers").info("not shown")
warnings.warn("deprecated")
try:
    {}["key"]
except KeyError:
    logger.exception("EngineCore encountered a fatal error.")
raise ValueError("the end")
"""


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    variables = {"VLLM_LOGGING_CONFIG_PATH": str(lines.CONFIG), "PDSERVE_INSTANCE": "prefill-0", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-P", "-c", AS_VLLM_DOES], capture_output=True, text=True, env=variables, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_every_line_is_an_object_with_instance_and_part(told: list[dict[str, Any]]) -> None:
    assert {(line["process"], line["instance"]) for line in told} == {("engine", "prefill-0")}
    assert [(line["level"], line["part"]) for line in told] == [
        ("INFO", "vllm.v1.engine.async_llm"), ("WARNING", "vllm.v1.engine.async_llm"), ("INFO", "vllm.v1.engine.async_llm"),
        ("INFO", "uvicorn.access"), ("INFO", "uvicorn.error"), ("WARNING", "transformers"), ("WARNING", "py.warnings"),
        ("ERROR", "vllm.v1.engine.async_llm"), ("CRITICAL", "vllm"),
    ]  # fmt: skip
    assert told[1]["message"] == "two lines\nof one message"
    assert told[3]["message"] == '127.0.0.1:1 - "POST /v1/completions HTTP/1.1" 200'


def test_the_request_that_vllm_names_is_the_clients(told: list[dict[str, Any]]) -> None:
    assert [line["request_id"] for line in told if line["request_id"]] == ["my-id"]
    assert told[2]["message"].startswith("Aborted")  # two requests: neither is the one


def test_a_traceback_is_one_record_the_last_one_too(told: list[dict[str, Any]]) -> None:
    assert told[-2]["exception"].splitlines()[-1] == "KeyError: 'key'"
    assert told[-1]["message"] == "ended by ValueError"
    assert told[-1]["exception"].splitlines()[-1] == "ValueError: the end"


@pytest.mark.parametrize(
    ("message", "request_id"),
    [
        ("Received request cmpl-a-b-0-0123abcd: params", "a-b"),
        ("Request chatcmpl-x failed (bad request)", "x"),
        ("retrieved 5 tokens request_id=cmpl-r-0-0123abcd", "r"),
        ("cmpl-r-0-0123abcd and again cmpl-r-0-0123abcd", "r"),
        ("nothing of mycmpl-x", None),
    ],
)
def test_names(message: str, request_id: str | None) -> None:
    assert lines.Lines("engine", "e").request(message) == request_id

"""A consumer is killed while it answers: another one goes on, and the clients see one stream each.

A proxy of its own stands before two engines of the running deployment, and a session's engine is killed under a
completion, which is resumed from its tokens, and a tool call, which is repeated from the start; a chat goes on beside
them. float32 and temperature 0: each must be what it is without the disturbance.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from pdserve.openai_client import Client
from pdserve.target import free_port

from .conformance_rows import SAY, WEATHER
from .conftest import wait_for

if TYPE_CHECKING:
    from .conftest import Deployment

USAGE = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
LENGTH = 300


@pytest.fixture
def proxy(pd: Deployment, tmp_path: Path) -> Iterator[Client]:
    port, log = free_port(), tmp_path / "proxy.log"
    engines = {"decode-0": pd.target.engines["decode"][0], "prefill-0": pd.target.engines["prefill"][0]}
    command = [sys.executable, "-P", "-m", "pdserve", "proxy", "--port", str(port), "--policy", "session"]
    command += ["--both", *(f"{name}={url}" for name, url in engines.items())]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        with Client(f"http://127.0.0.1:{port}", model=pd.client.model, timeout=240) as client:
            wait_for(client.healthy, 120, f"the proxy was not ready:\n{log.read_text()[-2000:]}")
            yield client
    finally:
        process.terminate()
        process.wait(60)


class Stream:
    """One streamed answer, read in a thread of its own."""

    def __init__(self, url: str, path: str, body: dict[str, Any]) -> None:
        self.engine, self.events, self.texts, self.refused = "", list[Any](), 0, ""
        self._thread = threading.Thread(target=self._read, args=(url + path, body))
        self._thread.start()

    def _read(self, url: str, body: dict[str, Any]) -> None:
        session = {"x-session-id": "one"}
        with httpx.Client(timeout=240, trust_env=False) as http, http.stream("POST", url, json=body, headers=session) as answer:
            self.engine = answer.headers.get("x-pdserve-decode", "")
            if answer.status_code != 200:
                self.refused = f"{answer.status_code}: {answer.read().decode()}"
                return
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    data = line[5:].strip()
                    self.events.append(data if data == "[DONE]" else json.loads(data))
                    self.texts += '"text":' in data or '"content":' in data or '"arguments":' in data

    def result(self) -> dict[str, Any]:
        self._thread.join(240)
        assert not self.refused, self.refused
        assert self.events[-1] == "[DONE]", self.events[-3:]
        made: dict[str, Any] = {"text": "", "arguments": "", "names": [], "ids": 0, "ends": [], "roles": 0}
        for event in self.events[:-1]:
            assert "error" not in event, event
            made["usage"] = {k: v for k, v in (event.get("usage") or {}).items() if k.endswith("_tokens")}
            for choice in event["choices"]:
                delta = choice.get("delta") or {}
                made["text"] += choice.get("text") or delta.get("content") or ""
                made["roles"] += bool(delta.get("role"))
                for call in delta.get("tool_calls") or ():
                    made["ids"] += bool(call.get("id"))
                    made["names"] += [call["function"]["name"]] if call["function"].get("name") else []
                    made["arguments"] += call["function"].get("arguments") or ""
                made["ends"] += [choice["finish_reason"]] if choice.get("finish_reason") else []
        made["one id"] = len({event["id"] for event in self.events[:-1]})
        return made


def start(pd: Deployment, proxy: Client, prompt: tuple[int, ...]) -> list[Stream]:
    model = pd.client.model
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": list(prompt), "max_tokens": LENGTH, "ignore_eos": True}),
        ("/v1/chat/completions", {"messages": SAY, "max_tokens": 250, "tools": [WEATHER], "tool_choice": "required"}),
        ("/v1/chat/completions", {"messages": SAY, "max_tokens": LENGTH, "min_tokens": LENGTH}),
    ]
    streams = []
    for path, body in asked:  # one after the other: a session's engine gets two of three, the third would be too many
        streams.append(Stream(proxy.url, path, {"model": model, **body, **USAGE}))
        wait_for(lambda: streams[-1].engine or streams[-1].refused, 120, "no answer began")
    return streams


def test_a_consumer_is_killed_in_mid_stream(pd: Deployment, proxy: Client) -> None:
    prompt = pd.ids(600)
    quiet = [stream.result() for stream in start(pd, proxy, prompt)]
    streams = start(pd, proxy, prompt)
    wait_for(lambda: all(stream.texts or stream.refused for stream in streams), 120, "the streams did not begin")
    engine = streams[0].engine
    count = sum(stream.engine == engine for stream in streams)
    assert count >= 2
    old = pd.pid(engine)
    os.kill(old, signal.SIGKILL)
    disturbed = [stream.result() for stream in streams]
    assert disturbed == quiet
    assert quiet[1]["names"] == ["get_weather"]
    assert quiet[1]["ids"] == 1
    assert quiet[0]["usage"] == {"prompt_tokens": 600, "completion_tokens": LENGTH, "total_tokens": 600 + LENGTH}
    told = proxy.get("/metrics", timeout=10).text
    took_over = [line for line in told.splitlines() if line.startswith("pdserve_takeovers_total{")]
    # One at least: on a fast machine the short one of the two may have ended before the kill.
    assert sum(float(line.rsplit(" ", 1)[1]) for line in took_over) >= 1, took_over
    assert not any('how="none"' in line for line in took_over), took_over
    wait_for(lambda: pd.pid(engine) not in (0, old), 120, f"{engine} was not started again")
    pd.wait_up()
    pd.wait_idle()

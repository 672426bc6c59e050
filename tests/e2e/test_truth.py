"""What a deployment tells of its requests: records, explain, headers, logs, one trace over all its processes.

It has a small cache, so that chunks are evicted, and is started here because the others have no use for traces. Each test has
prompts and request ids of its own, new ones when it runs once more.
"""

from __future__ import annotations

import json
import random
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from otlp import Received, Receiver

from pdserve import target, topology
from pdserve.openai_client import Client
from pdserve.prompts import make_ids
from pdserve.target import Target

TOPOLOGY = """
name: e2e-truth
model: demo
engine:
  device: cpu
  dtype: bfloat16
  max_model_len: 2048
  max_num_seqs: 4
  kv_cache_space_gib: 1
  env: {{VLLM_SERVER_DEV_MODE: "1"}}
prefill: [{{port: 23010, cpus: "0"}}]
decode: [{{port: 23020, cpus: "1"}}]
cache: {{size: 64MiB, load: always, patience: 20, admin_port: 23030}}
proxy: {{port: 23000}}
tracing: {{endpoint: "{otlp}"}}
"""

class Truth:
    def __init__(self, found: Target, receiver: Receiver) -> None:
        self.target, self.receiver = found, receiver
        self.run = ""

    def begin(self) -> None:
        self.run = secrets.token_hex(4)

    def ids(self, count: int) -> tuple[int, ...]:
        """A prompt that nothing has seen before."""
        with Client(self.target.engines["prefill"][0]) as engine:
            return make_ids(random.Random(), engine.tokenize, count)

    def id(self, name: str) -> str:
        return f"{name}-{self.run}"

    def ask(self, name: str, prompt: Any, **more: Any) -> httpx.Response:
        headers = {"x-request-id": self.id(name), **more.pop("headers", {})}
        body = {"model": "smollm2-135m-instruct", "prompt": list(prompt), "max_tokens": 4, "temperature": 0, **more}
        reply = httpx.post(f"{self.target.url}/v1/completions", json=body, headers=headers, timeout=120)
        assert reply.status_code == 200, reply.text
        assert self.target.empty_engine_caches()
        return reply

    def record(self, name: str) -> dict[str, Any]:
        """With what both engines have told, which comes a moment later."""
        deadline = time.monotonic() + 120
        while True:
            told: dict[str, Any] = json.loads(pdserve("explain", self.id(name), "--url", self.target.url, "--json").stdout)
            instances = {span["instance"] for span in told["spans"] if span["name"] in ("load", "transfer", "queue")}
            if told["chunks"] and {"prefill-0", "decode-0"} <= instances:
                return told
            assert time.monotonic() < deadline, json.dumps(told)
            time.sleep(0.2)

    def whys(self, name: str) -> list[str]:
        return [chunk["why"] or chunk["source"] for chunk in self.record(name)["chunks"]]


def pdserve(*words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pdserve", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def deployed(stage: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Truth]:
    stage.close()  # two deployments would not fit a small machine
    file: Path = tmp_path_factory.mktemp("truth") / "truth.yaml"
    with Receiver() as receiver:
        file.write_text(TOPOLOGY.format(otlp=receiver.url))
        top = topology.load(file)
        try:
            target.launch(file)
            yield Truth(Target.of(top), receiver)
        finally:
            target.stop(top.name)


@pytest.fixture
def truth(deployed: Truth) -> Truth:
    deployed.begin()
    return deployed


def test_why_chunks_were_hit_or_missed(truth: Truth) -> None:
    prompt = truth.ids(700)
    truth.ask("cold", prompt)
    assert all(why.startswith("never stored") for why in truth.whys("cold"))
    assert "not full" in truth.whys("cold")[-1]

    hit = truth.ask("hit", prompt)
    record = truth.record("hit")
    assert {chunk["source"] for chunk in record["chunks"]} == {"dram"}
    assert hit.headers["x-pdserve-cached-tokens"] == "gpu=0,dram=700"
    assert float(hit.headers["x-pdserve-load-ms"]) > 0
    assert (record["prompt_tokens"], record["cached_tokens"], record["output_tokens"]) == (700, {"dram": 700}, 4)
    assert record["finish_reason"] == "length"

    other = [*prompt[:300], prompt[300] + 1, *prompt[301:]]
    truth.ask("differs", other)
    assert truth.whys("differs")[0] == "dram"
    assert "at token 300, here" in truth.whys("differs")[1]

    truth.ask("salted", prompt, cache_salt="bob")
    assert all("under no cache_salt: never shared" in why for why in truth.whys("salted"))

    truth.ask("longer", [*prompt, *truth.ids(100)])
    assert truth.whys("longer")[:2] == ["dram", "dram"]
    assert "ended at token 700: its last chunk was not full" in truth.whys("longer")[2]

    for n in (3, 4):
        truth.ask(f"filler-{n}", truth.ids(1500))
    truth.ask("again", prompt)
    assert any(
        "evicted from dram" in why and "to make room for what prefill-0 stored" in why for why in truth.whys("again")
    )

    text = " ".join(pdserve("explain", truth.id("again"), "--url", truth.target.url).stdout.split())
    assert "Two engines shared it: prefill-0 computed the prompt, decode-0 the answer." in text
    assert "evicted from dram" in text
    listed = httpx.get(f"{truth.target.url}/admin/requests", params={"limit": 3}, timeout=10).json()["requests"]
    assert [r["id"] for r in listed] == [truth.id(name) for name in ("again", "filler-4", "filler-3")]
    assert listed[0]["prompt_tokens"] == 700


def test_one_trace_over_proxy_both_engines_and_cache(truth: Truth) -> None:
    trace, parent = secrets.token_hex(16), secrets.token_hex(8)
    given = f"00-{trace}-{parent}-01"
    truth.ask("traced", truth.ids(600), headers={"traceparent": given}, stream=True)

    def complete(spans: list[Received]) -> bool:
        """All is there that is looked at below: each process sends its spans in its own time, in several parts."""
        mine = [span for span in spans if span.trace_id == trace]
        legs = {span.attributes.get("pdserve.instance"): span.span_id for span in mine if span.name.endswith(" leg")}
        known = {span.span_id for span in mine} | {parent}
        return (
            any(span.parent_id == parent for span in mine)
            and {span.parent_id for span in mine} <= known
            and {span.name for span in mine if span.service == "cache"} >= {"cache lookup", "kv store", "engine queue"}
            and all(legs.get(s) in {x.parent_id for x in mine if x.service == s} for s in ("prefill-0", "decode-0"))
        )

    spans = [span for span in truth.receiver.wait(complete, 120) if span.trace_id == trace]
    by_id = {span.span_id: span for span in spans}
    root = next(span for span in spans if span.parent_id == parent)
    assert (root.service, root.name) == ("proxy", "POST /v1/completions")
    legs = {span.attributes["pdserve.instance"]: span for span in spans if span.name.endswith(" leg")}
    for service in ("prefill-0", "decode-0"):
        assert any(span.parent_id == legs[service].span_id for span in spans if span.service == service)
    assert {span.name for span in spans if span.service == "cache"} >= {"cache lookup", "kv store", "engine queue"}
    assert all(span.parent_id in by_id or span.parent_id == parent for span in spans)
    assert truth.record("traced")["trace_id"] == trace


def test_logs_of_all_processes_about_one_request(truth: Truth) -> None:
    truth.ask("spoken-of", truth.ids(500))
    truth.record("spoken-of")

    def lines() -> list[dict[str, Any]]:
        command = ("logs", "e2e-truth", "--request", truth.id("spoken-of"), "--json")
        return [json.loads(line) for line in pdserve(*command).stdout.splitlines()]

    deadline, both = time.monotonic() + 60, {("engine", "prefill-0"), ("engine", "decode-0")}
    while True:
        told = lines()
        if {(line["process"], line["instance"]) for line in told} >= both:
            break
        assert time.monotonic() < deadline, told
        time.sleep(0.2)
    assert all(truth.id("spoken-of") in (line["request_id"] or line["message"]) for line in told)
    times = [line["time"] for line in told]
    assert times == sorted(times)
    everything = pdserve("logs", "e2e-truth").stdout
    for name in ("cache", "prefill-0", "decode-0", "proxy"):
        assert f" {name} " in everything

"""The words of the command, what is refused before anything is sent, the client's own cost, and what a proxy adds to the records."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pdserve import bench
from pdserve.bench import cli, facts, one, records_of, results, runner, workloads
from pdserve.bench.record import Record
from pdserve.bench.runner import Server
from pdserve.errors import ConfigError, UpstreamError


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(bench.default_words(list(words)))


def test_without_a_word_it_is_quick() -> None:
    assert parse().word == "quick"
    assert (parse("http://x:1").word, parse("http://x:1").target) == ("quick", "http://x:1")
    assert parse("--requests", "3").requests == 3
    for name in workloads.NAMES:
        needed = {"sharegpt": ["--dataset-path", "x"], "trace-replay": ["--trace-directory", "x"]}.get(name, [])
        assert parse(name, *needed).word == name


def test_a_workload_that_does_not_exist_is_no_deployments_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean long-doc-qa"):
        parse("long-docs-qa")
    with pytest.raises(ConfigError, match=r"'nonsense' is no workload\. Known: quick, long-doc-qa"):
        parse("nonsense", "http://x:1")
    assert (parse("my-1p1d").word, parse("my-1p1d", "--json").target) == ("quick", "my-1p1d")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scale", "0"], "must be positive"),
        (["--start-users", "2"], "--max-users and --slo-ttft"),
        (["--start-users", "4", "--max-users", "2", "--slo-ttft", "1", "--duration", "9"], "more than --max-users"),
        (["--start-users", "1", "--max-users", "2", "--slo-ttft", "1"], "when to end"),
        (
            ["--start-users", "1", "--max-users", "2", "--slo-ttft", "1", "--duration", "9", "--rate", "1"],
            "no users to ramp",
        ),
        (["--header", "x"], "NAME=VALUE"),
        (["--extra-body", "[1]"], "JSON object"),
        (["--arms", "cache", "http://x:1"], "one or the other"),
        (["--repetitions", "0"], "must be positive"),
    ],
)
def test_what_makes_no_sense_is_refused_first(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        one.check(parse("random", *words))


def test_results_have_somewhere_to_go_before_anything_is_measured(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        one.check(parse("random", "--out", str(taken)))
    one.check(parse("random", "--out", str(tmp_path / "new" / "folder")))
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    with pytest.raises(ConfigError, match="is no folder"):
        results.read_folder(taken)


def test_a_load_that_a_workload_would_ignore_is_refused() -> None:
    server = Server("http://x:1", "m", None, 1.0)
    with pytest.raises(ConfigError, match="says itself when each request comes in"):
        one.make_plan(parse("multi-round-qa", "--rate", "3"), server)
    assert one.make_plan(parse("random", "--rate", "3"), server).stages


def test_a_prompt_that_is_too_long_says_which_scale_fits() -> None:
    plan = workloads.plan_of("long-doc-qa")
    with pytest.raises(ConfigError, match=r"--scale 0\.1[0-9]+") as caught:
        runner.check_length(plan, 4096)
    scale = float(caught.value.fix.split("--scale ")[1].split(",")[0])
    runner.check_length(workloads.plan_of("long-doc-qa", scale=scale), 4096)
    runner.check_length(plan, None)


def test_the_client_is_held_against_an_instant_server() -> None:
    found = runner.overhead(4, bound_ms=10_000)
    assert 0 < found["p50_ms"] <= found["p99_ms"]
    assert found["requests_per_s"] > 0
    with pytest.raises(ConfigError, match="this client itself takes"):
        runner.overhead(4, bound_ms=1e-6)


def test_a_key_is_not_in_the_noted_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["pdserve", "bench", "random", "--api-key", "secret", "--api-key=secret", "--seed", "1"]
    )
    assert facts.command() == "pdserve bench random --api-key '***' '--api-key=***' --seed 1"
    monkeypatch.setattr("sys.argv", ["/home/somebody/checkout/tests/gpu/run_bench.py", "agents", "--gpu", "0"])
    assert facts.command() == "python -P tests/gpu/run_bench.py agents --gpu 0"
    assert cli.headers_of(parse("random", "--header", "a=b=c")) == {"a": "b=c"}


ROWS = [{"id": "r1", "route": "pd", "cached_tokens": None, "load_ms": None}, {"id": "other"}]
FULL = {"id": "r1", "cached_tokens": {"dram": 256}, "load_ms": 3.5, "saved_ms": 40.0, "reason": "why"}


@pytest.fixture
def proxy() -> Iterator[str]:
    """Answers as a pdserve proxy, or like a server that is none."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = {"/admin/requests": {"requests": ROWS}, "/admin/requests/r1": FULL}.get(self.path.partition("?")[0])
            body = json.dumps(found or {}).encode()
            self.send_response(200 if found else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def row(name: str, route: str = "pd") -> Record:
    return Record(stage="s", session="s", step=0, intended=0.0, request_id=name, route=route)


def test_a_proxy_tells_tier_and_times_of_each_request(proxy: str) -> None:
    records = [row("r1"), row("forgotten"), row("foreign", route="")]
    assert records_of.fill_in(Server(proxy, "m", None, 1.0), records) == 1
    assert (records[0].tiers, records[0].load_ms, records[0].saved_ms) == ({"dram": 256}, 3.5, 40.0)
    assert (records[1].tiers, records[1].load_ms) == ({}, None)
    assert records_of.fill_in(Server("http://127.0.0.1:9", "m", None, 1.0), records) == 0


def test_a_server_without_models_is_named(proxy: str) -> None:
    with pytest.raises(ConfigError, match="Name the model"):
        runner.ask(proxy)
    assert runner.ask(proxy, "given").tokens_per_word == 1.0
    with pytest.raises(UpstreamError):
        runner.ask("http://127.0.0.1:9")

"""verify and its client against small servers that answer as vLLM does, right and wrong."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pdserve import target as targets
from pdserve import verify
from pdserve.errors import ConfigError, UpstreamError
from pdserve.openai_client import ApiError, Client, by_label, parse_metrics, total
from pdserve.target import Target


@dataclass
class Server:
    """An engine whose answer is a function of the prompt. `shift` makes it another function: wrong tokens."""

    shift: int = 0
    cached_from: int = 10**9  # from this request on, prompts count as cached
    metrics: dict[str, float] = field(default_factory=dict)
    cut: bool = False  # ends streams before they are finished
    requests: int = 0
    url: str = ""


def handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def reply(self, body: Any, status: int = 200, kind: str = "application/json") -> None:
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.reply({"data": [{"id": "m", "max_model_len": 700}]})
            elif self.path == "/metrics":
                self.reply("".join(f"{k} {v}\n" for k, v in server.metrics.items()), kind="text/plain")
            else:
                self.reply({})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
            if self.path == "/tokenize":
                return self.reply({"tokens": [len(w) for w in body["prompt"].split()]})
            if self.path == "/reset_prefix_cache":
                return self.reply({})
            if body.get("model") != "m":
                return self.reply({"error": {"message": "no such model"}}, 404)
            server.requests += 1
            prompt = body.get("prompt") or [len(str(body["messages"]))]
            prompt = [len(prompt)] if isinstance(prompt, str) else prompt
            tokens = [(sum(prompt) + i + server.shift) % 97 for i in range(body["max_tokens"])]
            return self.answer(body, len(prompt), tokens)

        def answer(self, body: dict[str, Any], prompt_tokens: int, tokens: list[int]) -> None:
            cached = prompt_tokens - 1 if server.requests >= server.cached_from else 0
            usage = {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": len(tokens),
                "prompt_tokens_details": {"cached_tokens": cached},
            }
            parts = tokens if body.get("stream") else [tokens]
            chat = "messages" in body
            choices = [self.choice(chat, p if isinstance(p, list) else [p], bool(body.get("stream"))) for p in parts]
            if not body.get("stream"):
                return self.reply({"choices": [{**choices[0], "finish_reason": "length"}], "usage": usage})
            if not server.cut:
                choices[-1]["finish_reason"] = "length"
            events: list[dict[str, Any]] = [{"choices": [c]} for c in choices] + [{"choices": [], "usage": usage}]
            text = "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n"
            return self.reply(text, kind="text/event-stream")

        @staticmethod
        def choice(chat: bool, tokens: list[int], stream: bool) -> dict[str, Any]:
            text = "".join(f" {t}" for t in tokens)
            names = [f"token_id:{t}" for t in tokens]
            if chat:
                content = [
                    {"token": n, "logprob": -0.5, "top_logprobs": [{"token": n, "logprob": -0.5}]} for n in names
                ]
                message = {"delta" if stream else "message": {"content": text}}
                return {**message, "token_ids": tokens, "logprobs": {"content": content}}
            logprobs = {
                "tokens": names,
                "token_logprobs": [-0.5] * len(names),
                "top_logprobs": [{n: -0.5} for n in names],
            }
            return {"text": text, "token_ids": tokens, "logprobs": logprobs}

    return Handler


def serve(stack: ExitStack, server: Server) -> Server:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler(server))
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    stack.callback(thread.join)
    stack.callback(httpd.server_close)
    stack.callback(httpd.shutdown)
    server.url = f"http://127.0.0.1:{httpd.server_address[1]}"
    return server


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    return parser.parse_args(words)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = verify.main(arguments(*words, "--json"))
    return code, json.loads(capsys.readouterr().out)


def test_equal_answers_and_hits_pass(stack: ExitStack, capsys: pytest.CaptureFixture[str]) -> None:
    plain, pdserve = serve(stack, Server()), serve(stack, Server(cached_from=0))
    code, report = run(capsys, pdserve.url, "--plain", plain.url, "--dtype", "float32", "--seed", "7")
    assert code == 0
    assert report["ok"]
    assert report["seed"] == 7
    assert [r["prompt_tokens"] for r in report["results"]][:10] == [1, 15, 16, 17, 255, 256, 257, 511, 512, 513]
    assert all(r["warm"]["tokens_equal"] for r in report["results"])


def test_one_wrong_token_fails(stack: ExitStack, capsys: pytest.CaptureFixture[str]) -> None:
    plain, pdserve = serve(stack, Server()), serve(stack, Server(shift=1, cached_from=0))
    code, report = run(capsys, pdserve.url, "--plain", plain.url, "--dtype", "float32", "--lengths", "5")
    assert code == 1
    assert "cold: token 0" in report["results"][0]["problems"][0]


def test_a_cache_that_never_hits_fails(stack: ExitStack, capsys: pytest.CaptureFixture[str]) -> None:
    plain, pdserve = serve(stack, Server()), serve(stack, Server())
    code, report = run(capsys, pdserve.url, "--plain", plain.url, "--dtype", "float32", "--lengths", "16,300")
    assert code == 1
    problems = {r["case"]: r["problems"] for r in report["results"]}
    assert problems["16 tokens"] == []  # less than a chunk: computing it is as good
    assert problems["300 tokens"] == ["warm: 0 tokens cached, at least 256 expected"]


def test_a_failed_digest_and_a_lease_left_behind_fail(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "SETTLE_SECONDS", 0.0)
    daemon = serve(
        stack, Server(metrics={'pdserve_cache_digest_failures_total{tier="dram"}': 0, "pdserve_cache_leases": 2})
    )
    target = Target(url="", plain_url="", admin_url=daemon.url)
    counters = targets.CacheCounters(stored_chunks=3, loaded_chunks=3, digest_failures=1)
    problems = verify._cache_problems(target, counters, [])
    assert problems == ["1 chunks failed their digest", "left in the cache daemon: 2 leases"]


def test_table_fits_80_columns(stack: ExitStack, capsys: pytest.CaptureFixture[str]) -> None:
    plain, pdserve = serve(stack, Server()), serve(stack, Server(shift=1, cached_from=0))
    code = verify.main(arguments(pdserve.url, "--plain", plain.url, "--dtype", "bfloat16", "--quick"))
    out = capsys.readouterr().out
    assert code == 1
    assert "DIFFERS" in out
    assert "FAILED (log-probabilities within 0.5; seed" in out
    assert max(map(len, out.splitlines())) <= 80


def test_prompts_from_a_file(stack: ExitStack, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plain, pdserve = serve(stack, Server()), serve(stack, Server(cached_from=0))
    file = tmp_path / "prompts.jsonl"
    file.write_text('"a text"\n\n[1, 2, 3]\n[{"role": "user", "content": "hi"}]\n')
    common = (pdserve.url, "--plain", plain.url, "--dtype", "float32", "--prompts", str(file))
    code, report = run(capsys, *common)
    assert code == 0
    assert [r["case"] for r in report["results"]] == ["line 1", "line 3", "line 4"]
    file.write_text("{}\n")
    with pytest.raises(ConfigError, match="jsonl:1 is neither"):
        verify.main(arguments(*common))


def test_what_cannot_be_verified_is_a_usage_error(stack: ExitStack) -> None:
    pdserve = serve(stack, Server())
    with pytest.raises(ConfigError, match="give a plain engine"):
        verify.main(arguments(pdserve.url))
    with pytest.raises(ConfigError, match="--lengths"):
        verify.main(arguments(pdserve.url, "--plain", pdserve.url, "--dtype", "float32", "--lengths", "a"))
    with pytest.raises(ConfigError, match="positive"):
        verify.main(arguments(pdserve.url, "--max-tokens", "0"))
    with pytest.raises(UpstreamError):
        verify.main(arguments("http://127.0.0.1:9", "--plain", "http://127.0.0.1:9", "--dtype", "float32"))


@pytest.mark.parametrize("stream", [True, False])
def test_client_reads_streams_and_whole_answers(stack: ExitStack, stream: bool) -> None:
    server = serve(stack, Server(cached_from=0))
    with Client(server.url + "/v1/") as client:
        a = client.complete([3, 4], max_tokens=3, stream=stream, logprobs=1)
        b = client.chat([{"role": "user", "content": "hi"}], max_tokens=2, stream=stream, logprobs=1)
    assert a.token_ids == (7, 8, 9)
    assert (a.text, a.prompt_tokens, a.cached_tokens, a.finish_reason) == (" 7 8 9", 2, 1, "length")
    assert [t.top for t in a.logprobs] == [{7: -0.5}, {8: -0.5}, {9: -0.5}]
    assert 0 < a.ttft <= a.total
    assert len(b.token_ids) == len(b.logprobs) == b.completion_tokens == 2


def test_client_tells_errors_apart(stack: ExitStack) -> None:
    server = serve(stack, Server(cut=True))
    with Client(server.url, model="other") as client, pytest.raises(ApiError) as refused:
        client.complete([1])
    assert refused.value.status == 404
    with Client(server.url) as client, pytest.raises(UpstreamError, match="without a finish_reason"):
        client.complete([1])


def test_metrics_are_summed_by_label() -> None:
    metrics = parse_metrics('# TYPE a_total counter\na_total{tier="dram",x="1"} 2\na_total{tier="disk",x="1"} 3\nb 1\n')
    assert total(metrics, "a_total") == 5
    assert total(metrics, "a_total", tier="disk") == 3
    assert total(metrics, "b") == 1
    assert by_label(metrics, "a_total", "tier") == {"dram": 2, "disk": 3}

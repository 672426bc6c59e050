from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

RECORD: dict[str, Any] = {
    "id": "r1", "received": 1000.0, "endpoint": "/v1/completions", "model": "m", "session": None, "tenant": "anybody",
    "route": "local", "reason": "no-producer", "prefill": None, "decode": "both-0", "state": "done", "status": 200,
    "error": None, "prompt_tokens": 300, "cached_tokens": {}, "output_tokens": 2, "ttft_ms": 5.0, "duration_ms": 9.0,
    "load_ms": 0.0, "saved_ms": None, "finish_reason": "stop", "trace_id": None, "recoveries": 0, "spans": [], "notes": [],
    "chunks": [{"index": 0, "first_token": 0, "tokens": 256, "key": "0" * 16, "source": "computed", "why": "because " * 30}],
}  # fmt: skip


class Proxy(ThreadingHTTPServer):
    def __init__(self) -> None:
        server = self
        self.asked: list[tuple[str, str | None]] = []
        self.known = True

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append((self.path, self.headers.get("authorization")))
                status, told = 200, RECORD
                if self.path.startswith("/admin/requests?"):
                    told = {"requests": [RECORD] if server.known else []}
                elif self.path.endswith("/nobody"):
                    status, told = 404, {"error": {"message": "No request of that id is remembered here."}}
                elif self.path.endswith("/secret"):
                    status, told = 401, {"error": {"message": "The admin key is missing or wrong."}}
                body = b"<html>" if self.path.endswith("/page") else json.dumps(told).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.05,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def explain(proxy: Proxy, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-P",
        "-m",
        "pdserve",
        "explain",
        "--url",
        f"http://127.0.0.1:{proxy.server_port}",
        *words,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env or None)


def test_the_latest_and_one_by_its_id(proxy: Proxy) -> None:
    done = explain(proxy, PDSERVE_ADMIN_TOKEN="boss")
    assert done.returncode == 0, done.stderr
    assert "both-0 did all of it (no-producer)." in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    told = json.loads(explain(proxy, "a b/c", "--json").stdout)
    assert told == RECORD
    assert proxy.asked == [
        ("/admin/requests?limit=1", "Bearer boss"), ("/admin/requests/r1", "Bearer boss"), ("/admin/requests/a%20b/c", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("request_id", "says"),
    [
        ("nobody", "the proxy keeps the latest 2000"),
        ("secret", "Set PDSERVE_ADMIN_TOKEN"),
        ("page", "is this a proxy?"),
    ],
)
def test_what_is_wrong_is_said(proxy: Proxy, request_id: str, says: str) -> None:
    done = explain(proxy, request_id)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_served_and_nobody_there(proxy: Proxy) -> None:
    proxy.known = False
    assert "has served no request yet" in explain(proxy).stderr
    proxy.server_port = 9
    done = explain(proxy)
    assert done.returncode == 3
    assert "Give its address: --url URL" in done.stderr

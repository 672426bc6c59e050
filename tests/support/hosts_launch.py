"""A deployment over hosts made of namespaces: `pdserve launch --host` on each, and requests from one of them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import netns

SECRET = "a secret that only tests know"
PDSERVE = [sys.executable, "-P", "-m", "pdserve"]
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Answer:
    def __init__(self, body: dict[str, Any], headers: dict[str, str], status: int) -> None:
        self.body, self.headers, self.status = body, {k.lower(): v for k, v in headers.items()}, status

    @property
    def ids(self) -> list[int]:
        found: list[int] = self.body["choices"][0]["token_ids"]
        return found

    @property
    def cached(self) -> int:
        details = self.body["usage"].get("prompt_tokens_details") or {}
        return int(details.get("cached_tokens") or 0)

    @property
    def route(self) -> str:
        return self.headers.get("x-pdserve-route", "")


class Spread:
    """`launch` starts a topology's parts, one supervisor for each host, each with a run directory of its own."""

    def __init__(self, net: netns.Net, topology: str, folder: Path) -> None:
        self.net, self.folder = net, folder
        self.file = folder / "topology.yaml"
        self.file.write_text(topology)
        self.supervisors: dict[str, subprocess.Popen[bytes]] = {}
        for host in net.hosts.values():
            (folder / host.name).mkdir(exist_ok=True)
            # Short: a unix socket's path must fit.
            host.env = {"PDSERVE_RUN_DIR": str(folder / host.name), "PDSERVE_PEER_SECRET": SECRET}

    def launch(self, *names: str) -> None:
        for name in names:
            words = [*PDSERVE, "launch", str(self.file), "--host", name, "--force"]
            self.supervisors[name] = self.net[name].start(words, self.folder / f"{name}.log")

    def status(self, name: str) -> list[dict[str, Any]]:
        done = self.net[name].run(*PDSERVE, "status", "--json", timeout=60)
        return json.loads(done.stdout) if done.stdout.strip().startswith("[") else []

    def wait_ready(self, *names: str, seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        for name in names:
            state = self.folder / name / f"{self.name}@{name}" / "state.json"
            while True:
                found = json.loads(state.read_text())["state"] if state.exists() else ""
                if found == "ready":
                    break
                ended = self.supervisors[name].poll() is not None
                assert not ended, f"{name}: {(self.folder / f'{name}.log').read_text()[-3000:]}"
                assert time.monotonic() < deadline, (
                    f"{name} is {found!r}: {(self.folder / f'{name}.log').read_text()[-3000:]}"
                )
                time.sleep(0.3)

    @property
    def name(self) -> str:
        return next(
            line.split(":")[1].strip() for line in self.file.read_text().splitlines() if line.startswith("name:")
        )

    def ask(self, host: str, url: str, body: dict[str, Any] | None = None, timeout: float = 120) -> Answer:
        request = urllib.request.Request(url, json.dumps(body).encode() if body is not None else None)
        request.add_header("Content-Type", "application/json")
        with self.net[host].inside():
            try:
                with OPENER.open(request, timeout=timeout) as answer:
                    text = answer.read()
                    return Answer(json.loads(text) if text else {}, dict(answer.headers), answer.status)
            except urllib.error.HTTPError as error:
                with error:
                    return Answer({"error": error.read().decode()}, dict(error.headers), error.code)

    def complete(self, host: str, url: str, prompt: list[int], tokens: int = 12, **more: Any) -> Answer:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True, **more}
        return self.ask(host, f"{url}/v1/completions", body)

    def together(self, host: str, url: str, prompts: list[list[int]], tokens: int = 12, **more: Any) -> list[Answer]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.complete(host, url, prompt, tokens, **more), prompts))

    def daemon(self, name: str) -> dict[str, Any]:
        return self.ask(name, "http://127.0.0.1:22680/status").body

    def log(self, host: str, process: str) -> str:
        return (self.folder / host / f"{self.name}@{host}" / "logs" / f"{process}.log").read_text()

    def stop(self, *names: str) -> None:
        running = [self.supervisors.pop(name) for name in names or list(self.supervisors) if name in self.supervisors]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in running:
            process.wait(120)


@contextlib.contextmanager
def hosts(*names: str) -> Iterator[netns.Net]:
    net = netns.Net(*names)
    try:
        yield net
    finally:
        net.close()
        for path in Path("/dev/shm").glob(f"pdserve-hosts{os.getpid()}*"):
            path.unlink()

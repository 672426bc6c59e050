"""A newcomer's path with a watch in hand: `make newcomer`. Standard library only, as a fresh machine has it.

A fresh clone, an empty PDSERVE_HOME and an empty pip cache in a temporary folder; then what the quickstart says: set up, launch,
the first streamed token through prefill and decode, the dashboard, the same long prompt again. Every step's seconds are printed, and
the exit code is 0 only if the stream came over both legs and the second prompt was hit. Everything is stopped and removed at the end.

  python3 scripts/newcomer.py [--base-port 8000] [--pip-cache] [--here] [--json] [--keep]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SETUP_SECONDS, LAUNCH_SECONDS, ANSWER_SECONDS = 3600.0, 900.0, 300.0
PORTS = (8000, 8080, 8100, 8200)
MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of France?"
LONG = "Summarise these rules. " + " ".join(f"Rule {n}: keep the shelf number {n * 7} in order." for n in range(120))


class Failed(Exception):
    """A step that did not do what the quickstart promises."""


@dataclass
class Watch:
    begun: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def step(self, name: str, since: float, note: str = "") -> None:
        now = time.monotonic()
        row = {"step": name, "seconds": round(now - since, 1), "since_start": round(now - self.begun, 1), "note": note}
        self.rows.append(row)
        print(f"{row['since_start']:7.1f} s  {name} ({row['seconds']:.1f} s){': ' + note if note else ''}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-port", type=int, default=8000, help="use ports from here on (default 8000: as shipped)")
    parser.add_argument("--pip-cache", action="store_true", help="let pip use the cache of this machine")
    parser.add_argument(
        "--here", action="store_true", help="begin after the setup, with this checkout and its .venv as they are"
    )
    parser.add_argument("--json", action="store_true", help="print the steps as JSON at the end")
    parser.add_argument("--keep", action="store_true", help="leave the folder, stop only the processes")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    folder = Path(tempfile.mkdtemp(prefix="newcomer-"))
    watch = Watch()
    try:
        walk(folder, args, watch)
    except Failed as problem:
        print(f"newcomer: {problem}", file=sys.stderr)
        return 1
    finally:
        stop(ROOT if args.here else folder / "pdserve", folder)
        if args.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(watch.rows, indent=1))
    return 0


def walk(folder: Path, args: argparse.Namespace, watch: Watch) -> None:
    checkout = ROOT if args.here else set_up(folder, args.pip_cache, watch)
    home = os.environ.get("PDSERVE_HOME", str(Path.home() / ".cache" / "pdserve")) if args.here else None
    topology, since = with_ports(checkout, folder, args.base_port), time.monotonic()
    command = pdserve(checkout, "launch", str(topology), "--detach")
    run(command, checkout, LAUNCH_SECONDS, environment(folder, home=home), shown=True)
    watch.step("pdserve launch local-cpu: ready", since)
    url, since = f"http://127.0.0.1:{args.base_port}", time.monotonic()
    route = first_token(url)
    watch.step("first streamed token", since, f"x-pdserve-route: {route}")
    if route != "pd":
        raise Failed(f"the first answer took the route {route!r}, not prefill and decode")
    since = time.monotonic()
    size = len(fetch(f"{url}/dashboard"))
    watch.step("dashboard", since, f"{size / 1000:.0f} kB")
    for name in ("a long prompt", "the same again"):
        since = time.monotonic()
        cached, tokens = ask(url)
        watch.step(name, since, f"{cached} of {tokens} prompt tokens from the cache")
    if not cached or watch.rows[-1]["seconds"] >= watch.rows[-2]["seconds"]:
        raise Failed("the second prompt was not answered from the cache")


def set_up(folder: Path, pip_cache: bool, watch: Watch) -> Path:
    checkout, since = folder / "pdserve", time.monotonic()
    run(["git", "clone", "--quiet", str(ROOT), str(checkout)], folder, 300)
    watch.step("git clone", since)
    since = time.monotonic()
    run(["make", "setup"], checkout, SETUP_SECONDS, environment(folder, pip_cache), shown=True)
    watch.step("make setup", since)
    return checkout


def environment(folder: Path, pip_cache: bool = True, home: str | None = None) -> dict[str, str]:
    own = {"PDSERVE_HOME": home or str(folder / "home"), "PDSERVE_RUN_DIR": str(folder / "run"), "NO_COLOR": "1"}
    return {**os.environ, **own, **({} if pip_cache else {"PIP_CACHE_DIR": str(folder / "pip")})}


def pdserve(checkout: Path, *words: str) -> list[str]:
    return [str(checkout / ".venv" / "bin" / "pdserve"), *words]


def run(command: list[str], cwd: Path, seconds: float, env: dict[str, str] | None = None, shown: bool = False) -> None:
    pipe = None if shown else subprocess.PIPE
    try:
        done = subprocess.run(
            command, cwd=cwd, env=env, timeout=seconds, check=False, stdout=pipe, stderr=pipe, text=True
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(command)} took more than {seconds:g} s") from None
    if done.returncode:
        raise Failed(f"{' '.join(command)} ended with code {done.returncode}: {(done.stderr or '').strip()[-500:]}")


def with_ports(checkout: Path, folder: Path, base: int) -> Path:
    """The shipped topology; on other ports and under another name where the usual ones are not to be touched."""
    shipped = checkout / "deploy" / "topologies" / "local-cpu.yaml"
    if base == PORTS[0]:
        return shipped
    text = shipped.read_text().replace("name: local-cpu", "name: newcomer")
    for n, port in enumerate(PORTS):
        text = re.sub(rf"\b(admin_port|port): {port}\b", rf"\1: {base + n}", text)
    made = folder / "newcomer.yaml"
    made.write_text(text)
    return made


def post(url: str, body: dict[str, Any]) -> urllib.request.Request:
    return urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})


def opened(request: urllib.request.Request | str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(request, timeout=ANSWER_SECONDS)
    except OSError as error:
        raise Failed(f"{getattr(request, 'full_url', request)}: {error}") from error


def fetch(url: str) -> bytes:
    with opened(url) as answer:
        return bytes(answer.read())


def first_token(url: str) -> str:
    """Returns with the first token; the answer's route."""
    body = {"model": MODEL, "stream": True, "max_tokens": 16, "messages": [{"role": "user", "content": QUESTION}]}
    with opened(post(f"{url}/v1/chat/completions", body)) as answer:
        for line in answer:
            text = line.decode().removeprefix("data:").strip()
            if text.startswith("{") and json.loads(text)["choices"][0].get("delta", {}).get("content"):
                return str(answer.headers.get("x-pdserve-route"))
    raise Failed("the stream ended without a token")


def ask(url: str) -> tuple[int, int]:
    """(cached prompt tokens, prompt tokens) of the long prompt."""
    with opened(post(f"{url}/v1/completions", {"model": MODEL, "prompt": LONG, "max_tokens": 4})) as answer:
        usage = json.load(answer)["usage"]
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0), int(usage["prompt_tokens"])


def stop(checkout: Path, folder: Path) -> None:
    command = pdserve(checkout, "stop", "--all")
    if Path(command[0]).exists():
        subprocess.run(command, env=environment(folder), timeout=180, check=False, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())

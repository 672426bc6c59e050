"""A long run against fake engines: does the proxy's memory stay where it is?

    python tests/proxy/soak.py [--requests 1000000] [--streams 64] [--every 10000] [--fail-every 500]

Prints resident memory and open descriptors as it goes; exit 1 if the last tenth used more than `--slack` MiB above the
second tenth's. Streams, whole answers, sessions, failing producers and clients that leave take turns. What failures leave
behind shows sooner with many of them: 200,000 requests with --fail-every 20 have as many as five million with 500.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import uvloop

from pdserve.engines.fake.server import FakeEngine, Fault
from pdserve.errors import UpstreamError
from pdserve.proxy.upstream import Upstream

PROXY = "import sys; from pdserve.proxy import app; import argparse as a; p = a.ArgumentParser(); " \
    "app.add_arguments(p); sys.exit(app.main(p.parse_args()))"  # fmt: skip
HEADERS = [(b"content-type", b"application/json")]


def resident(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def one(upstream: Upstream, number: int, chance: random.Random) -> None:
    body = {"model": "fake", "prompt": f"q {number % 5000} " + "word " * (number % 300), "stream": number % 2 == 0, "max_tokens": 4}
    headers = [*HEADERS, (b"x-session-id", b"s%d" % (number % 5000))]
    async with upstream.request(b"POST", b"/v1/completions", headers, json.dumps(body).encode(), 10) as answer:
        while await answer.chunk(60):
            if chance.random() < 0.01:
                return  # leaves in mid-stream


async def run(args: argparse.Namespace) -> int:
    chance = random.Random(1)
    async with FakeEngine(name="p", keep=0) as producer, FakeEngine(name="d", keep=0) as one_, FakeEngine(keep=0) as two:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = ["--port", str(port), "--prefill", producer.url, "--decode", one_.url, two.url, "--policy", "chunk_location"]
        quiet = {**os.environ, "PDSERVE_LOG_LEVEL": "error"}
        process = subprocess.Popen(  # noqa: ASYNC220 - once, before anything is measured
            [sys.executable, "-c", PROXY, *words], env=quiet
        )
        try:
            return await measured(args, chance, Upstream("proxy", f"http://127.0.0.1:{port}"), producer, process.pid)
        finally:
            process.terminate()
            process.wait(60)


async def measured(
    args: argparse.Namespace, chance: random.Random, upstream: Upstream, producer: FakeEngine, pid: int
) -> int:
    for _ in range(600):
        try:
            await one(upstream, 1, chance)
            break
        except UpstreamError:
            await asyncio.sleep(0.1)
    left, seen, began = iter(range(args.requests)), list[float](), time.monotonic()

    async def client() -> None:
        for number in left:
            if number % args.fail_every == 0:
                producer.faults.append(Fault("reset"))
            try:
                await one(upstream, number, chance)
            except UpstreamError as exc:
                print(f"request {number}: {exc}")
            if number % args.every == 0:
                seen.append(resident(pid))
                files, took = descriptors(pid), time.monotonic() - began
                print(f"{number:>9} requests  {seen[-1]:7.1f} MiB  {files:4} descriptors  {took:7.0f} s", flush=True)

    await asyncio.gather(*(client() for _ in range(args.streams)))
    early, late = max(seen[len(seen) // 10 : len(seen) // 5 + 1]), max(seen[-max(1, len(seen) // 10) :])
    print(f"after the warm-up {early:.1f} MiB, at the end {late:.1f} MiB")
    return 0 if late <= early + args.slack else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--every", type=int, default=10_000)
    parser.add_argument("--fail-every", type=int, default=500, help="requests, until a producer breaks a connection")
    parser.add_argument("--slack", type=float, default=4.0, help="MiB")
    return uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    raise SystemExit(main())

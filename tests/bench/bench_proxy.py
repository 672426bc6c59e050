"""What the proxy costs: one fake engine asked directly and through the proxy, in one run; and the HTTP clients alone.

    python tests/bench/bench_proxy.py [--quick] [--json FILE]

Every process is its own; requests of the rows alternate, so that a disturbance of the machine meets all of them. Times
in milliseconds; "added" and "ratio" are against the first row.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import uvloop

from pdserve.proxy.upstream import Upstream

PROXY = "import sys; from pdserve.proxy import app, options; import argparse as a; p = a.ArgumentParser(); " \
    "app.add_arguments(p); sys.exit(app.main(p.parse_args()))"  # fmt: skip
HEADERS = [(b"content-type", b"application/json")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Processes:
    """The processes of a run; all are gone when the block is left."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait(20)

    def engine(self, **flags: object) -> str:
        port = free_port()
        words = [w for key, value in flags.items() for w in (f"--{key}", str(value))]
        return self._start(["-m", "pdserve.engines.fake.server", "--port", str(port), *words], port)

    def proxy(self, *words: str) -> str:
        port = free_port()
        return self._start(["-c", PROXY, "--port", str(port), *words], port)

    def rust_router(self, producer: str, consumer: str) -> str | None:
        """vllm-router in its PD mode, where it is installed: the neighbour to be measured against."""
        places = (Path(sys.executable).parent / "vllm-router", Path(os.environ.get("VLLM_ROUTER", "/nowhere")))
        binary = next((place for place in places if place.exists()), None)
        if binary is None:
            return None
        port = free_port()
        words = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
        words += ["--vllm-pd-disaggregation", "--kv-connector", "nixl", "--policy", "round_robin"]
        return self._start([*words, "--prefill", producer, "--decode", consumer], port, str(binary))

    def _start(self, words: list[str], port: int, program: str = sys.executable) -> str:
        quiet = {**os.environ, "PDSERVE_LOG_LEVEL": "error"}
        out = subprocess.DEVNULL
        self.running.append(subprocess.Popen([program, *words], stdout=out, stderr=out, env=quiet))
        url = f"http://127.0.0.1:{port}"
        for _ in range(400):
            with contextlib.suppress(OSError, httpx.HTTPError):
                if httpx.get(url + "/health").status_code == 200:
                    return url
            time.sleep(0.05)
        raise SystemExit(f"{words} did not come up")


async def first_token(upstream: Upstream, body: bytes) -> float:
    """Seconds to the first bytes of the stream, over a kept connection."""
    began = time.perf_counter()
    async with upstream.request(b"POST", b"/v1/completions", HEADERS, body, 5) as answer:
        await answer.chunk(30)
        took = time.perf_counter() - began
        while await answer.chunk(30):
            pass
    return took


async def alternate(rows: dict[str, Callable[[], Awaitable[float]]], times: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in rows}
    for n in range(times + 20):
        for name, measure in rows.items():
            took = await measure()
            if n >= 20:  # the first ones warm connections and code paths
                found[name].append(took * 1000)
    return found


def summary(found: dict[str, list[float]], base: str) -> list[dict[str, Any]]:
    reference = statistics.median(found[base])
    rows = []
    for name, times in found.items():
        p50, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
        rows.append({"row": name, "p50": p50, "p99": p99, "added": p50 - reference, "ratio": p50 / reference})
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    columns = list(rows[0])
    print("  " + columns[0].ljust(22) + "".join(c.rjust(12) for c in columns[1:]))
    for row in rows:
        cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in list(row.values())[1:])
        print("  " + str(row["row"]).ljust(22) + "".join(c.rjust(12) for c in cells))


async def ttft(urls: dict[str, str], words: int, times: int) -> list[dict[str, Any]]:
    body = json.dumps({"model": "fake", "prompt": "word " * words, "stream": True, "max_tokens": 4}).encode()
    ups = {name: Upstream(name, url) for name, url in urls.items()}
    found = await alternate({n: (lambda u=u: first_token(u, body)) for n, u in ups.items()}, times)  # type: ignore[misc]
    return summary(found, "direct")


async def rate(url: str, streams: int, tokens: int, requests: int) -> tuple[float, float, float]:
    """Requests/s, events/s and p99 TTFT (ms) of `streams` clients that ask again as soon as they are served."""
    upstream = Upstream("x", url)
    body = json.dumps({"model": "fake", "prompt": "a b c", "stream": True, "max_tokens": tokens}).encode()
    left, firsts = iter(range(requests)), []

    async def client() -> None:
        for _ in left:
            firsts.append(await first_token(upstream, body))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(streams)))
    took = time.perf_counter() - began
    return requests / took, requests * (tokens + 1) / took, statistics.quantiles(firsts, n=100)[98] * 1000


async def rates(urls: dict[str, str], streams: int, tokens: int, requests: int) -> list[dict[str, Any]]:
    rows, base = [], 0.0
    for name, url in urls.items():
        await rate(url, streams, tokens, max(20, requests // 10))
        per_s, events, p99 = await rate(url, streams, tokens, requests)
        base = base or per_s
        rows.append({"row": name, "requests/s": per_s, "events/s": events, "p99 TTFT": p99, "ratio": per_s / base})
    return rows


async def crowd(urls: dict[str, str], streams: int, rounds: int) -> list[dict[str, Any]]:
    """TTFT while `streams` clients ask at once, again and again; the rows take turns, round by round."""
    body = json.dumps({"model": "fake", "prompt": "word " * 200, "stream": True, "max_tokens": 4}).encode()
    ups = {name: Upstream(name, url) for name, url in urls.items()}
    found: dict[str, list[float]] = {name: [] for name in ups}
    for n in range(rounds + 1):
        for name, upstream in ups.items():
            took = await asyncio.gather(*(first_token(upstream, body) for _ in range(streams)))
            found[name] += [seconds * 1000 for seconds in took] if n else []
    rows = summary(found, "direct")
    base = next((row for row in rows if "vllm-router" in row["row"]), None)
    for row in rows:
        row["p50 / router"] = row["p50"] / base["p50"] if base else 0.0
        row["p99 / router"] = row["p99"] / base["p99"] if base else 0.0
    return rows


async def gaps(urls: dict[str, str], streams: int, tokens: int) -> list[dict[str, Any]]:
    """Time between events of paced streams: what the proxy adds to the pace of the engine."""
    body = json.dumps({"model": "fake", "prompt": "a b c", "stream": True, "max_tokens": tokens}).encode()

    async def one(upstream: Upstream) -> list[float]:
        times = []
        async with upstream.request(b"POST", b"/v1/completions", HEADERS, body, 5) as answer:
            while await answer.chunk(30):
                times.append(time.perf_counter())
        return [(b - a) * 1000 for a, b in itertools.pairwise(times)][:-1]

    found: dict[str, list[float]] = {}
    for name, url in urls.items():
        upstream = Upstream(name, url)
        parts = await asyncio.gather(*(one(upstream) for _ in range(streams)))
        found[name] = [gap for part in parts for gap in part]
    rows = summary(found, "direct")
    for row in rows:
        row["added p99"] = row["p99"] - rows[0]["p99"]
    return rows


async def single_events(url: str, pid: int, streams: int, tokens: int, pace: int) -> list[dict[str, Any]]:
    """Events that arrive one by one, as engines' do: how many of them a second of one core's time carries."""
    body = json.dumps({"model": "fake", "prompt": "a b c", "stream": True, "max_tokens": tokens}).encode()
    upstream = Upstream("x", url)

    async def one() -> int:
        seen = 0
        async with upstream.request(b"POST", b"/v1/completions", HEADERS, body, 5) as answer:
            while data := await answer.chunk(30):
                seen += data.count(b"\n\n")
        return seen

    began, before = time.perf_counter(), ticks(pid)
    seen = sum(await asyncio.gather(*(one() for _ in range(streams))))
    took, used = time.perf_counter() - began, ticks(pid) - before
    row = f"{streams} streams, each {pace} tokens/s"
    return [{"row": row, "events/s": seen / took, "share of a core": used / took, "events/s of core": seen / used}]


async def per_core(urls: dict[str, str], pids: dict[str, list[int]], streams: int, requests: int) -> list[dict[str, Any]]:
    """Requests for each second of processor time of the proxy's own processes: what more workers cost, whatever else runs
    on the machine's cores. With as many free cores as workers, requests/s grow by workers x (ratio of this column)."""
    rows = []
    for name, url in urls.items():
        await rate(url, streams, 1, max(20, requests // 10))
        before = [ticks(pid) for pid in pids[name]]
        per_s, _, _ = await rate(url, streams, 1, requests)
        used = [ticks(pid) - b for pid, b in zip(pids[name], before, strict=True)]
        row = {"row": name, "requests/s": per_s, "requests/s of core": requests / sum(used)}
        rows.append({**row, "busiest worker": max(used) / sum(used)})
    for row in rows:
        row["ratio"] = row["requests/s of core"] / rows[0]["requests/s of core"]
    return rows


def children(pid: int) -> list[int]:
    """A process's, or the process itself if it has none."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found] or [pid]


async def idle(url: str, pid: int, streams: int) -> list[dict[str, Any]]:
    """Memory of the proxy for each stream that is open and says nothing."""
    upstream = Upstream("x", url)
    body = json.dumps({"model": "fake", "prompt": "a b c", "stream": True, "max_tokens": 2}).encode()
    began, left = asyncio.Event(), streams

    async def hold() -> None:
        nonlocal left
        async with upstream.request(b"POST", b"/v1/completions", HEADERS, body, 5) as answer:
            await answer.chunk(60)
            left -= 1
            await began.wait()

    before = resident(pid)
    tasks = [asyncio.create_task(hold()) for _ in range(streams)]
    while left:  # noqa: ASYNC110 - a count, not an event
        await asyncio.sleep(0.1)
    held = resident(pid)
    began.set()
    await asyncio.gather(*tasks)
    return [{"row": f"{streams} open streams", "KiB each": (held - before) / streams / 1024}]


async def processor(url: str, pid: int, words: int, times: int) -> list[dict[str, Any]]:
    """Processor time of the proxy for one request, short and long."""
    rows, upstream = [], Upstream("x", url)
    for count in (3, words):
        raw = json.dumps({"model": "fake", "prompt": "word " * count, "stream": True, "max_tokens": 4}).encode()
        for n in range(times + 10):
            if n == 10:
                before = ticks(pid)
            await first_token(upstream, raw)
        used = (ticks(pid) - before) / times * 1000
        rows.append({"row": f"{len(raw) // 1024} KiB body", "ms of processor": used})
    return rows


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ticks(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.asynccontextmanager
async def libraries(url: str, body: bytes) -> AsyncIterator[dict[str, Callable[[], Awaitable[float]]]]:
    """The candidates for the proxy's client, each doing the same: POST, first bytes of the stream, rest."""
    path, own = url + "/v1/completions", Upstream("own", url)
    kind = {"content-type": "application/json"}

    async def by_own() -> float:
        return await first_token(own, body)

    async def by_httpx() -> float:
        began, took = time.perf_counter(), 0.0
        async with slow.stream("POST", path, content=body, headers=kind) as answer:
            async for _ in answer.aiter_raw():
                took = took or time.perf_counter() - began
        return took

    rows = {"plain socket": plain_socket(url, body), "upstream.py": by_own, "httpx": by_httpx}
    async with httpx.AsyncClient(timeout=30) as slow, contextlib.AsyncExitStack() as stack:
        try:
            import aiohttp
        except ImportError:
            yield rows
            return
        middle = await stack.enter_async_context(aiohttp.ClientSession())

        async def by_aiohttp() -> float:
            began, took = time.perf_counter(), 0.0
            async with middle.post(path, data=body, headers=kind) as answer:
                async for _ in answer.content.iter_any():
                    took = took or time.perf_counter() - began
            return took

        yield {**rows, "aiohttp": by_aiohttp}


def plain_socket(url: str, body: bytes) -> Callable[[], Awaitable[float]]:
    """The floor: a socket, no parsing, the end known by its last bytes."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    kept: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def measure() -> float:
        if not kept:
            kept.append(await asyncio.open_connection(host, int(port)))
        reader, writer = kept[0]
        began = time.perf_counter()
        writer.write(head + body)
        await reader.readuntil(b"data: ")
        took = time.perf_counter() - began
        await reader.readuntil(b"0\r\n\r\n")
        return took

    return measure


async def clients(url: str, words: int, times: int) -> list[dict[str, Any]]:
    body = json.dumps({"model": "fake", "prompt": "word " * words, "stream": True, "max_tokens": 4}).encode()
    async with libraries(url, body) as rows:
        return summary(await alternate(rows, times), "plain socket")


def run(quick: bool) -> dict[str, Any]:
    times = 200 if quick else 1000
    with Processes() as start:
        engine, producer = start.engine(), start.engine()
        local = start.proxy("--decode", engine, "--model", "fake")
        pd = start.proxy("--prefill", producer, "--decode", engine, "--model", "fake")
        urls = {"direct": engine, "proxy, local": local, "proxy, PD": pd}
        if router := start.rust_router(producer, engine):
            urls["vllm-router, PD"] = router
        pid = start.running[2].pid
        pair, pids = {"one worker": local}, {"one worker": [pid]}
        pair["two workers"] = start.proxy("--decode", engine, "--model", "fake", "--workers", "2")
        pids["two workers"] = children(start.running[-1].pid)
        slow, mute = start.engine(gap=0.02), start.engine(gap=30)
        paced = {"direct": slow, "proxy, PD": start.proxy("--prefill", producer, "--decode", slow, "--model", "fake")}
        paced_pid = start.running[-1].pid
        quiet, quiet_pid = start.proxy("--decode", mute, "--model", "fake"), start.running[-1].pid
        found = {
            "TTFT, prompt of 2,000 words": uvloop.run(ttft(urls, 2000, times)),
            "TTFT, prompt of 80,000 words (400 kB)": uvloop.run(ttft(urls, 80_000, times // 10)),
            "TTFT, 16 clients at once": uvloop.run(crowd(urls, 16, times // 10)),
            "TTFT, 128 clients at once": uvloop.run(crowd(urls, 128, max(5, times // 50))),
            "8 tokens each, 16 streams": uvloop.run(rates(urls, 16, 8, times * 2)),
            "500 tokens each, 16 streams": uvloop.run(rates(urls, 16, 500, times // 5)),
            "1 token each, 32 streams, two workers beside one": uvloop.run(per_core(pair, pids, 32, times * 4)),
            "ITL, 128 streams of 50 tokens/s": uvloop.run(gaps(paced, 128, 100)),
            "single events through one worker": uvloop.run(single_events(paced["proxy, PD"], paced_pid, 200, 150, 50)),
            "processor time of one request": uvloop.run(processor(local, pid, 80_000, times // 10)),
            "memory of idle streams": uvloop.run(idle(quiet, quiet_pid, 500)),
            "HTTP client alone, TTFT": uvloop.run(clients(engine, 2000, times)),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    found = run(args.quick)
    for title, rows in found.items():
        show(title, rows)
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
        with open(args.json, "w") as out:
            json.dump({"commit": commit.stdout.strip(), "machine": machine, "rows": found}, out, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

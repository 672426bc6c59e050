"""What the proxy costs: one fake engine asked directly and through the proxy, in one run; and the HTTP clients alone.

    python tests/bench/bench_proxy.py [--quick] [--only WORD ...] [--json FILE]

Every process is its own; rows take turns, in another order each round, so that a disturbance of the machine meets all of
them. Times in milliseconds; "added" and "ratio" are against the first row. All processes share the machine's cores: the
clients (this one), two engines, and what is measured, of which the proxy can fill one core for each worker and the router,
which has threads, all of them. "cpu ms" is the processor time of the proxy's or router's own processes for each request,
which depends least on what else runs.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import uvloop

from pdserve.proxy.upstream import Upstream

sys.path.insert(0, str(Path(__file__).parent))  # run with -P this folder is not searched
from proxy_clients import HEADERS, first_token, libraries
from proxy_ends import Processes, children, cpu, limited, resident

ROUNDS = 5
SHARE = 0.15  # of a core, for each worker whose number is what is measured


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
    print("  " + columns[0].ljust(22) + "".join(c.rjust(14) for c in columns[1:]))
    for row in rows:
        cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in list(row.values())[1:])
        print("  " + str(row["row"]).ljust(22) + "".join(c.rjust(14) for c in cells))


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
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in urls}
    for n in range(ROUNDS + 1):
        for name in turned(list(urls), n):
            measured = await rate(urls[name], streams, tokens, max(20, requests // ROUNDS))
            found[name] += [measured] if n else []  # the first round warms
    rows, base = [], 0.0
    for name, parts in found.items():
        per_s, events, p99 = (statistics.median(column) for column in zip(*parts, strict=True))
        base = base or per_s
        rows.append({"row": name, "requests/s": per_s, "events/s": events, "p99 TTFT": p99, "ratio": per_s / base})
    return rows


def turned(names: list[str], n: int) -> list[str]:
    """Each round begins with another one."""
    n %= len(names)
    return names[n:] + names[:n]


async def crowd(urls: dict[str, str], pids: dict[str, list[int]], streams: int, rounds: int) -> list[dict[str, Any]]:
    """TTFT while `streams` clients ask at once, again and again; the rows take turns, round by round."""
    body = json.dumps({"model": "fake", "prompt": "word " * 200, "stream": True, "max_tokens": 4}).encode()
    ups = {name: Upstream(name, url) for name, url in urls.items()}
    found: dict[str, list[float]] = {name: [] for name in ups}
    used = dict.fromkeys(ups, 0.0)
    for n in range(rounds + 1):
        for name in turned(list(ups), n):
            before = spent(pids[name])
            took = await asyncio.gather(*(first_token(ups[name], body) for _ in range(streams)))
            if n:
                used[name] += spent(pids[name]) - before
                found[name] += [seconds * 1000 for seconds in took]
    rows = summary(found, "direct")
    direct, base = rows[0], next((row for row in rows if "vllm-router" in row["row"]), None)
    for row in rows:
        row["cpu ms"] = used[row["row"]] * 1000 / (rounds * streams)
        for part in ("p50", "p99"):
            row[f"{part} / router"] = row[part] / base[part] if base else 0.0
            added = row[part] - direct[part]
            row[f"added {part}"] = added / (base[part] - direct[part]) if base else 0.0
    return rows


def spent(pids: list[int]) -> float:
    return sum(cpu(pid) for pid in pids)


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

    began, before = time.perf_counter(), cpu(pid)
    seen = sum(await asyncio.gather(*(one() for _ in range(streams))))
    took, used = time.perf_counter() - began, cpu(pid) - before
    row = f"{streams} streams, each {pace} tokens/s"
    return [{"row": row, "events/s": seen / took, "share of a core": used / took, "events/s of core": seen / used}]


async def per_core(urls: dict[str, str], pids: dict[str, list[int]], streams: int, requests: int) -> list[dict[str, Any]]:
    """Requests for each second of processor time of the proxy's own processes: what more workers cost, whatever else runs
    on the machine's cores. With as many free cores as workers, requests/s grow by workers x (ratio of this column)."""
    rows = []
    for name, url in urls.items():
        await rate(url, streams, 1, max(20, requests // 10))
        before = [cpu(pid) for pid in pids[name]]
        per_s, _, _ = await rate(url, streams, 1, requests)
        used = [cpu(pid) - b for pid, b in zip(pids[name], before, strict=True)]
        row = {"row": name, "requests/s": per_s, "requests/s of core": requests / sum(used)}
        rows.append({**row, "busiest worker": max(used) / sum(used)})
    for row in rows:
        row["ratio"] = row["requests/s of core"] / rows[0]["requests/s of core"]
    return rows


async def scaled(urls: dict[str, str], pids: dict[str, list[int]], streams: int, seconds: float) -> list[dict[str, Any]]:
    """Requests/s of one worker and of two where the kernel gives every worker `SHARE` of a core and no more. Clients and
    engines then have cores enough on a small machine, and what is measured is the workers alone: whether two of them do
    twice the work of one, or wait for something that they share. The rows take turns."""
    body = json.dumps({"model": "fake", "prompt": "a b c", "stream": True, "max_tokens": 1}).encode()
    done, used, took = dict.fromkeys(urls, 0), dict.fromkeys(urls, 0.0), dict.fromkeys(urls, 0.0)
    ups = {name: Upstream(name, url) for name, url in urls.items()}

    async def client(name: str, end: float) -> None:
        while time.perf_counter() < end:
            await first_token(ups[name], body)
            done[name] += 1

    with limited([pid for row in pids.values() for pid in row], SHARE) as so:
        if not so:
            return [{"row": "no quota can be set here (it takes cgroup v1's cpu controller, and root)"}]
        for n in range(ROUNDS + 1):
            for name in turned(list(urls), n):
                began, before = time.perf_counter(), spent(pids[name])
                await asyncio.gather(*(client(name, began + seconds) for _ in range(streams)))
                if n == 0:
                    done[name] = 0
                else:
                    used[name] += spent(pids[name]) - before
                    took[name] += time.perf_counter() - began
    rows: list[dict[str, Any]] = [
        {"row": name, "requests/s": done[name] / took[name], "cores used": used[name] / took[name]} for name in urls
    ]
    for row in rows:
        # Much below 1 the machine was too busy to give the workers their quota: then the ratio says nothing.
        row["of its quota"] = row["cores used"] / (SHARE * len(pids[row["row"]]))
        row["requests/s of core"] = row["requests/s"] / row["cores used"]
        row["ratio"] = row["requests/s"] / rows[0]["requests/s"]
    return rows


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
                before = cpu(pid)
            await first_token(upstream, raw)
        used = (cpu(pid) - before) / times * 1000
        rows.append({"row": f"{len(raw) // 1024} KiB body", "ms of processor": used})
    return rows


async def begun(urls: dict[str, str], pids: dict[str, int], words: int, tokens: int, times: int) -> list[dict[str, Any]]:
    """What it costs to begin a stream with the producer's own first token: processor time of the proxy for each answer, and
    when its first and second event come. The rows take turns."""
    raw = json.dumps({"model": "fake", "prompt": "word " * words, "stream": True, "max_tokens": tokens}).encode()
    ups = {name: Upstream(name, url) for name, url in urls.items()}
    used, came = dict.fromkeys(urls, 0.0), {name: list[tuple[float, float]]() for name in urls}

    async def ask(name: str) -> tuple[float, float]:
        began, seen, at = time.perf_counter(), b"", []
        async with ups[name].request(b"POST", b"/v1/completions", HEADERS, raw, 5) as answer:
            while data := await answer.chunk(30):
                seen += data
                at += [time.perf_counter() - began] * (min(seen.count(b"\n\n"), 2) - len(at))
        return at[0], at[1]

    for n in range(ROUNDS + 1):
        for name in turned(list(urls), n):
            before = cpu(pids[name])
            found = [await ask(name) for _ in range(max(10, times // ROUNDS))]
            if n:
                used[name] += cpu(pids[name]) - before
                came[name] += found
    rows: list[dict[str, Any]] = []
    for name, pairs in came.items():
        first, second = (statistics.median(column) * 1000 for column in zip(*pairs, strict=True))
        rows.append({"row": name, "cpu ms": used[name] * 1000 / len(pairs), "first": first, "second": second})
    return rows


async def clients(url: str, words: int, times: int) -> list[dict[str, Any]]:
    body = json.dumps({"model": "fake", "prompt": "word " * words, "stream": True, "max_tokens": 4}).encode()
    async with libraries(url, body) as rows:
        return summary(await alternate(rows, times), "plain socket")


def sections(start: Processes, times: int) -> dict[str, Callable[[], Coroutine[Any, Any, list[dict[str, Any]]]]]:
    engine, producer = start.engine(), start.engine()
    engine_pid = start.running[0].pid
    local = start.proxy("--decode", engine, "--model", "fake")
    pid = start.running[-1].pid
    pd = start.proxy("--prefill", producer, "--decode", engine, "--model", "fake")
    urls = {"direct": engine, "proxy, local": local, "proxy, PD": pd}
    pids = {"direct": [engine_pid], "proxy, local": [pid], "proxy, PD": [start.running[-1].pid]}
    if router := start.rust_router(producer, engine):
        urls["vllm-router, PD"], pids["vllm-router, PD"] = router, [start.running[-1].pid]
    crowded = dict(urls)
    crowded["proxy, PD, 2 workers"] = start.proxy("--prefill", producer, "--decode", engine, "--model", "fake", "--workers", "2")
    pids["proxy, PD, 2 workers"] = children(start.running[-1].pid)
    pair, pair_pids = {"one worker": local}, {"one worker": [pid]}
    pair["two workers"] = start.proxy("--decode", engine, "--model", "fake", "--workers", "2")
    pair_pids["two workers"] = children(start.running[-1].pid)
    slow, mute = start.engine(gap=0.02), start.engine(gap=30)
    paced = {"direct": slow, "proxy, PD": start.proxy("--prefill", producer, "--decode", slow, "--model", "fake")}
    paced_pid = start.running[-1].pid
    late, later = start.engine(delay=0.02, gap=0.005), start.engine(delay=0.05, gap=0.005)
    ways: dict[str, tuple[dict[str, str], dict[str, int]]] = {}
    for what, (first, second) in {"instant": (producer, engine), "slow": (late, later)}.items():
        ways[what] = {}, {}
        for name, more in (("early leg", ()), ("early leg and token", ("--early-token",))):
            words = ("--prefill", first, "--decode", second, "--model", "fake", "--early-decode", *more)
            ways[what][0][name], ways[what][1][name] = start.proxy(*words), start.running[-1].pid
    quiet, quiet_pid = start.proxy("--decode", mute, "--model", "fake"), start.running[-1].pid
    return {
        "TTFT, prompt of 2,000 words": lambda: ttft(urls, 2000, times),
        "TTFT, prompt of 80,000 words (400 kB)": lambda: ttft(urls, 80_000, times // 10),
        "TTFT, 16 clients at once": lambda: crowd(crowded, pids, 16, times // 10),
        "TTFT, 128 clients at once": lambda: crowd(crowded, pids, 128, max(10, times // 10)),
        "8 tokens each, 16 streams": lambda: rates(urls, 16, 8, times * 2),
        "500 tokens each, 16 streams": lambda: rates(urls, 16, 500, times // 5),
        "1 token each, 32 streams, two workers beside one": lambda: per_core(pair, pair_pids, 32, times * 4),
        f"workers limited to {SHARE:.0%} of a core each": lambda: scaled(pair, pair_pids, 64, times / 200),
        "ITL, 128 streams of 50 tokens/s": lambda: gaps(paced, 128, 100),
        "single events through one worker": lambda: single_events(paced["proxy, PD"], paced_pid, 200, 150, 50),
        "processor time of one request, PD": lambda: processor(pd, pids["proxy, PD"][0], 80_000, times // 10),
        "first token of the producer's, 4 tokens": lambda: begun(*ways["instant"], 2000, 4, times),
        "first token of the producer's, 200 tokens": lambda: begun(*ways["instant"], 2000, 200, times // 2),
        "first token of the producer's, after 20 ms, the consumer's after 50": lambda: begun(*ways["slow"], 2000, 4, times // 4),
        "memory of idle streams": lambda: idle(quiet, quiet_pid, 500),
        "HTTP client alone, TTFT": lambda: clients(engine, 2000, times),
    }


def run(quick: bool, only: Sequence[str] = ()) -> dict[str, Any]:
    with Processes() as start:
        wanted = sections(start, 200 if quick else 1000)
        return {
            title: uvloop.run(measure()) for title, measure in wanted.items() if not only or any(word in title for word in only)
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--only", nargs="+", default=(), metavar="WORD", help="sections whose title has one of these words")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    found = run(args.quick, args.only)
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

"""What pdserve must be fast at, each figure beside its baseline from the same run, on real engines.

    python tests/bench/bench_quick.py [--json FILE] [--only SECTION ...] [--with-lmcache] [--check]

Sections: transfer (copies and lookups; bench_transfer.py), proxy (bench_proxy.py), reuse (warm against cold, on the
same engine and on one that never saw the prompt; throughput with nothing to reuse), pd (hand-over against plain vLLM).
--with-lmcache adds LMCache's MP mode as an arm of `reuse`; it is installed beside the environment, not into it.

One engine works at a time, and the two that are compared run on the same core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from pdserve import env, topology
from pdserve import target as targets
from pdserve.bench import quick as bench
from pdserve.openai_client import Client
from pdserve.target import Target, free_port

HERE = Path(__file__).parent
SECTIONS = ("transfer", "proxy", "reuse", "pd")
PROMPT = 3000
CPU = """
model: demo
engine:
  {device: cpu, dtype: bfloat16, max_model_len: 4096, max_num_seqs: 8, kv_cache_space_gib: 1,
   env: {VLLM_SERVER_DEV_MODE: "1"}}
"""
REUSE = f"""
name: bench-reuse
{CPU}
both: [{{port: 8120, cpus: "0"}}, {{port: 8121, cpus: "1"}}]
plain: [{{port: 8310, cpus: "0"}}]
cache: {{size: 2GiB, admin_port: 8090}}
proxy: {{port: 8010}}
"""
PD = f"""
name: bench-pd
{CPU}
prefill: [{{port: 8110, cpus: "0"}}]
decode: [{{port: 8210, cpus: "1"}}]
plain: [{{port: 8310, cpus: "0"}}]
cache: {{size: 2GiB, admin_port: 8090}}
proxy: {{port: 8010}}
"""
LMCACHE = ["lmcache==0.5.6", "aiofile", "caio", "aiofiles", "sortedcontainers", "nvtx", "redis"]
LMCACHE += ["opentelemetry-exporter-prometheus"]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `ratio` is measured / baseline, and the target bounds it from above or from below."""

    name: str
    measured: float
    baseline: float
    unit: str
    ratio: float
    target: str = ""
    held: bool | None = None


def at_most(name: str, measured: float, baseline: float, unit: str, limit: float) -> Row:
    ratio = measured / baseline
    return Row(name, measured, baseline, unit, ratio, f"<= {limit:g}", ratio <= limit)


def at_least(name: str, measured: float, baseline: float, unit: str, limit: float) -> Row:
    ratio = measured / baseline
    return Row(name, measured, baseline, unit, ratio, f">= {limit:g}", ratio >= limit)


def for_information(name: str, measured: float, baseline: float, unit: str) -> Row:
    return Row(name, measured, baseline, unit, measured / baseline)


# --- sections -------------------------------------------------------------------------------------------------------


def transfer(args: argparse.Namespace) -> list[Row]:
    """A 256-token chunk of the demo model into and out of the arena beside memcpy; a lookup of 400 chunks."""
    rows = []
    for found in _script("bench_transfer.py")["rows"]:
        what, value, baseline = found["what"], found["value"], found["baseline"]
        if what.startswith(("store:", "load:")):
            rows.append(at_least(f"{what} / memcpy", value, baseline, "GB/s", 0.5))
        elif what.startswith("lookup of 400") and what.endswith("p50"):
            rows.append(Row(f"{what} / ping", value, baseline, "ms", value / baseline, "<= 2 ms", value <= 2))
    return rows


def proxy(args: argparse.Namespace) -> list[Row]:
    """Time to first token through the proxy in front of one engine, minus the engine's own, in milliseconds."""
    found = next(iter(_script("bench_proxy.py", "--quick")["rows"].values()))
    by_name = {row["row"]: row for row in found}
    direct, local = by_name["direct"]["p50"], by_name["proxy, local"]["p50"]
    added = local - direct
    return [
        Row(
            "added TTFT p50, proxy and one engine",
            local,
            direct,
            "ms",
            local / direct,
            f"{added:.2f} <= 5 ms",
            added <= 5,
        )
    ]


def reuse(args: argparse.Namespace) -> list[Row]:
    """Two engines with the cache and a plain one."""
    with _running(REUSE) as target:
        first, second = (Client(url) for url in target.engines["both"])
        plain = Client(target.plain_url)
        rows = _warm_rows(target, first, second, plain, args.repeats)
        rows += _throughput_rows(target, plain, first, args.rounds)
    if args.with_lmcache:
        ours = next(row for row in rows if row.name.startswith("warm TTFT, same"))
        rows += _lmcache_rows(args.repeats, ours)
    return rows


def _warm_rows(target: Target, first: Client, second: Client, plain: Client, repeats: int) -> list[Row]:
    times: dict[str, list[float]] = {"plain": [], "own": [], "cold": [], "warm": [], "other": []}
    for prompt in _prompts(plain, repeats):
        plain.reset_prefix_cache()
        times["plain"].append(bench.ttft(plain, prompt)[0])
        times["own"].append(bench.ttft(plain, prompt)[0])
        times["cold"].append(bench.ttft(first, prompt)[0])
        bench.settle(target)
        times["warm"].append(_hit(first, prompt))
        times["other"].append(_hit(second, prompt))
        bench.settle(target)
    m = {name: median(values) for name, values in times.items()}
    return [
        at_most("warm TTFT, same engine / its cold", m["warm"], m["cold"], "s", 0.10),
        at_most("warm TTFT, engine that never saw it / cold", m["other"], m["cold"], "s", 0.10),
        for_information("plain vLLM's own prefix hit / cold", m["own"], m["plain"], "s"),
        for_information("cold TTFT with the cache / plain", m["cold"], m["plain"], "s"),
    ]


def _hit(engine: Client, prompt: bench.Ids) -> float:
    """The time of a request that must hit: one that computes everything would be a wrong figure."""
    seconds, cached = bench.ttft(engine, prompt)
    if cached < len(prompt) // 256 * 256 - 256:
        raise SystemExit(f"{engine.url} computed a prompt that is in the cache ({cached} of {len(prompt)} tokens hit)")
    return seconds


def _throughput_rows(target: Target, plain: Client, both: Client, rounds: int) -> list[Row]:
    """Rounds alternate between the engines, and so does who is first; nothing can be reused."""
    rng = random.Random(11)
    seconds = {plain.url: 0.0, both.url: 0.0}
    tokens = {plain.url: 0, both.url: 0}
    for n in range(rounds + 1):
        for engine in (plain, both) if n % 2 else (both, plain):
            prompts = bench.fresh_prompts(engine, 8, 400, rng.randrange(10**9))
            got = bench.throughput(engine, prompts, 48, 4)
            if n:  # the first round warms up
                seconds[engine.url] += got.seconds
                tokens[engine.url] += got.output_tokens
            bench.settle(target)
    rate = {url: tokens[url] / seconds[url] for url in seconds}
    return [at_least("output tokens/s, nothing to reuse / plain", rate[both.url], rate[plain.url], "tok/s", 0.95)]


def pd(args: argparse.Namespace) -> list[Row]:
    """One producer, one consumer, and plain vLLM on the producer's core."""
    with _running(PD) as target:
        client, plain = Client(target.url), Client(target.plain_url)
        times: dict[str, list[float]] = {"plain": [], "cold": [], "warm": []}
        for prompt in _prompts(plain, args.repeats):
            plain.reset_prefix_cache()
            times["plain"].append(bench.ttft(plain, prompt)[0])
            times["cold"].append(bench.ttft(client, prompt)[0])
            bench.settle(target)
            times["warm"].append(_hit(client, prompt))
            bench.settle(target)
    m = {name: median(values) for name, values in times.items()}
    return [
        at_most("PD TTFT / plain cold", m["cold"], m["plain"], "s", 1.15),
        for_information("PD warm TTFT / plain cold", m["warm"], m["plain"], "s"),
    ]


# --- LMCache, the arm to be ahead of --------------------------------------------------------------------------------


def _lmcache_rows(repeats: int, ours: Row) -> list[Row]:
    """Its MP mode over shared memory, chunks of 256, same core; vLLM's own prefix cache is emptied before the hit."""
    site = _install_lmcache()
    server, http, port = free_port(), free_port(), free_port()
    outside = {**os.environ, "PYTHONPATH": str(site), "PYTHONHASHSEED": "0", "LMCACHE_TRACK_USAGE": "false"}
    words = ["--host", "127.0.0.1", "--port", str(server), "--http-port", str(http), "--chunk-size", "256"]
    words += ["--l1-size-gb", "2", "--eviction-policy", "LRU", "--supported-transfer-mode", "engine_driven"]
    words += ["--shm-name", "pdservebench", "--disable-metrics"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_process([str(site / "bin" / "lmcache"), "server", *words], outside, "lmcache-server"))
        time.sleep(8)  # it has no readiness probe that waits for the message queue
        url = stack.enter_context(_lmcache_engine(server, port, outside))
        engine = stack.enter_context(Client(url))
        for count in (7, 300):
            engine.complete([11] * count, max_tokens=2)
        cold, warm = [], []
        for prompt in _prompts(engine, repeats):
            cold.append(bench.ttft(engine, prompt)[0])
            time.sleep(1.0)
            engine.reset_prefix_cache()
            warm.append(_hit(engine, prompt))
    ratio = median(warm) / median(cold)
    return [
        for_information("LMCache 0.5.6 MP warm TTFT / its cold", median(warm), median(cold), "s"),
        at_most("our warm ratio / LMCache's", ours.ratio, ratio, "", 1.0),
    ]


@contextlib.contextmanager
def _lmcache_engine(server: int, port: int, outside: dict[str, str]) -> Iterator[str]:
    """The plain engine of the same topology, with LMCache's connector."""
    from pdserve.deploy import plan

    top = topology.parse(REUSE)
    planned = next(p for p in plan.make(top, cores=[0]).processes if p.role == "plain")
    extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": server}
    config = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    argv = [word if word != "8310" else str(port) for word in planned.argv]
    argv += ["--kv-transfer-config", json.dumps(config)]
    with _process(argv, {**outside, **planned.env}, "lmcache-engine") as process:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 240
        with Client(url) as engine:
            while not engine.healthy():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the engine with LMCache did not come up; see the log")
                time.sleep(0.5)
        yield url


@contextlib.contextmanager
def _process(argv: list[str], variables: dict[str, str], name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process and its children, in a folder of its own; all are gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            argv, env=variables, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            os.killpg(process.pid, 9)
        process.wait(20)


def _install_lmcache() -> Path:
    """Into a folder of its own, without its dependencies: they fight with vLLM's versions."""
    site = env.home() / "bench" / "lmcache-0.5.6"
    if not (site / "bin" / "lmcache").exists():
        command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(site), *LMCACHE]
        subprocess.run(command, check=True, timeout=600)
    return site


# --- parts ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _running(text: str) -> Iterator[Target]:
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        file = Path(folder) / "topology.yaml"
        file.write_text(text)
        top = topology.load(file)
        say(f"starting {top.name}")
        try:
            targets.launch(file)
            target = Target.of(top)
            urls = [url for urls in target.engines.values() for url in urls]
            for url in (target.plain_url, *urls, target.url):
                with Client(url) as client:
                    for count in (7, 300):
                        client.complete([11] * count, max_tokens=2)
            yield target
        finally:
            targets.stop(top.name)


def _prompts(client: Client, count: int) -> list[bench.Ids]:
    return bench.fresh_prompts(client, count, PROMPT, random.SystemRandom().randrange(10**9))


def _script(name: str, *words: str) -> dict[str, Any]:
    """Runs a neighbour and reads what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-P", str(HERE / name), *words, "--json", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=600)
        found: dict[str, Any] = json.loads(out.read_text())
    return found


def machine() -> dict[str, str]:
    model = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=HERE
    )
    try:
        engine = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        engine = "none"
    cores = str(len(os.sched_getaffinity(0)))
    return {
        "cpu": model,
        "cores": cores,
        "python": platform.python_version(),
        "vllm": engine,
        "commit": commit.stdout.strip(),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(rows: list[Row], about: dict[str, str]) -> None:
    print(f"$ {shlex.join(['python', *sys.argv])}")
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"\n{'':44}{'measured':>10}{'baseline':>10}{'ratio':>7}  target")
    for row in rows:
        verdict = "" if row.held is None else ("  held" if row.held else "  MISSED")
        figures = f"{row.measured:>10.4g}{row.baseline:>10.4g}{row.ratio:>7.3f}"
        print(f"{row.name:44}{figures}  {row.target}{verdict}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="these sections only")
    parser.add_argument("--with-lmcache", action="store_true", help="measure LMCache's MP mode in the same run")
    parser.add_argument("--repeats", type=int, default=5, help="prompts per TTFT figure (default 5)")
    parser.add_argument("--rounds", type=int, default=4, help="throughput rounds per engine (default 4)")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target was missed")
    args = parser.parse_args()
    sections: dict[str, Callable[[argparse.Namespace], list[Row]]]
    sections = {"transfer": transfer, "proxy": proxy, "reuse": reuse, "pd": pd}
    rows: list[Row] = []
    for name in args.only:
        say(f"bench: {name}")
        rows += sections[name](args)
    about = machine()
    show(rows, about)
    if args.json:
        command = shlex.join(["python", *sys.argv])
        record = {"command": command, "machine": about, "rows": [asdict(row) for row in rows]}
        Path(args.json).write_text(json.dumps(record, indent=1))
    return 1 if args.check and any(row.held is False for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What a decoding step takes in served engines: run_decode.py --model DIR --out DIR [--gpu N] [--arms A,B,...] [--only PHASES]

Arms on one GPU, asked in strict turns: plain vLLM, a connector that does nothing, ours, peers; --variant NAME=FOLDER adds ours once
more, its modules from that folder. "short": all are fresh; then each has computed, and ours stored, 48000 tokens; then ours has
loaded them again. "long": each has a turn of its own: 16 prompts of 8000 tokens, four at a time, then the last four again, which are
in its GPU's cache, and last a profile: time in kernels and between them, by name. "alone": the first arm has long turns before any
other is started, since a device that several processes use is another one; --between is a command that is run between them. Each
figure comes with what the engine's process used meanwhile: processor time a step, switches a step. Beside the log of each engine lies
what its CUDA graphs took (graph_times).
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from engine_probe import GRAPHS, prompt
from gpu_session import daemon, keep_in, results, row

STREAMS, TOKENS, ROUNDS = 4, 160, 4
results["steps"] = []


class Served:
    """One vLLM server; `folder`: where its pdserve comes from, if not from where ours does."""

    def __init__(
        self, name: str, args: argparse.Namespace, port: int, transfer: dict | None, folder: str = "", more: tuple[str, ...] = (),
        settings: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.port, self._log = name, port, (args.out / f"{name}.log").open("w")
        self.profiles = args.out / f"profile-{name}"
        profiler = {"profiler": "torch", "torch_profiler_dir": str(self.profiles), "torch_profiler_with_stack": False}
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            args.model,
            "--port",
            str(port),
        ]
        command += [
            "--served-model-name",
            "m",
            "--load-format",
            "dummy",
            "--max-model-len",
            str(max(1024, 16384 // args.shrink)),
            "--max-num-seqs",
        ]
        command += ["64", "--kv-cache-memory-bytes", str(int(args.kv_gib * 2**30)), "--gpu-memory-utilization", "0.15"]
        command += ["--max-num-batched-tokens", "8192", "--compilation-config", json.dumps(GRAPHS)]
        command += ["--profiler-config", json.dumps(profiler)]
        if transfer is not None:
            command += ["--kv-transfer-config", json.dumps({**transfer, "kv_role": "kv_both"})]
        command += more
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": args.gpu, "VLLM_SERVER_DEV_MODE": "1", "PYTHONSAFEPATH": "1"}
        env |= {
            "VLLM_PORT": str(14000 + 20 * (port % 1000)),
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
        env |= {"GRAPH_TIMES": str(args.out / f"graphs-{name}"), "LMCACHE_CHUNK_SIZE": "256", "LMCACHE_LOCAL_CPU": "true"}
        env |= {"LMCACHE_MAX_LOCAL_CPU_SIZE": str(args.peers_gib), "LMCACHE_TRACK_USAGE": "false", "PYTHONHASHSEED": "0"}
        env |= settings or {}
        here = Path(__file__).parent
        paths = [str(here / "graph_times"), folder, os.environ.get("PYTHONPATH", ""), str(here)]
        env["PYTHONPATH"] = ":".join(p for p in paths if p)
        self.process = subprocess.Popen(command, env=env, stdout=self._log, stderr=subprocess.STDOUT)

    def up(self, until: float) -> bool:
        while time.monotonic() < until and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2)
                return True
            except OSError:
                time.sleep(0.5)
        return False

    def post(self, path: str) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method="POST", data=b"")
        urllib.request.urlopen(request, timeout=60).read()

    def answer(self, seed: int, n: int, out: int) -> list[float]:
        """When each event came."""
        body = {"model": "m", "prompt": prompt(seed, n)["prompt_token_ids"], "max_tokens": out, "temperature": 0}
        body |= {"ignore_eos": True, "stream": True, "return_token_ids": True}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            if reply.status != 200:
                raise RuntimeError(f"{self.name}: {reply.status} {reply.read()[:300]!r}")
            return [time.perf_counter() for line in reply if line.startswith(b"data: {")]
        finally:
            connection.close()

    def core(self) -> int:
        """The process that steps."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        named = [int(c) for c in children if "EngineCore" in Path(f"/proc/{c}/cmdline").read_text().replace("\0", " ")]
        return named[0] if named else self.process.pid

    def used(self) -> tuple[float, int, int]:
        """Seconds of processor, switches of all threads, the main thread's core."""
        core = Path(f"/proc/{self.core()}")
        fields = (core / "stat").read_text().rsplit(")", 1)[1].split()
        switches = 0
        for task in (core / "task").iterdir():
            lines = (task / "status").read_text().splitlines()
            switches += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), switches, int(fields[36])

    def steps(self, seed: int, answers: int = STREAMS, n: int = 500) -> dict:
        before = self.used()
        with ThreadPoolExecutor(STREAMS) as pool:
            each = list(pool.map(lambda i: self.answer(seed + i, n, TOKENS), range(answers)))
        after = self.used()
        steps = TOKENS * answers / STREAMS
        gaps = sorted(b - a for times in each for a, b in pairwise(times[8:]))
        return {
            "arm": self.name, "p50": statistics.median(gaps) * 1e3, "p99": gaps[int(len(gaps) * 0.99)] * 1e3,
            "cpu_ms": (after[0] - before[0]) * 1e3 / steps, "switches": (after[1] - before[1]) / steps, "core": after[2],
        }  # fmt: skip


def measure(arms: list[Served], phase: str, first: int) -> None:
    for again in range(ROUNDS):
        for n, arm in enumerate(arms):
            got = {"phase": phase, "round": again, **arm.steps(first + 1000 * again + 100 * n)}
            results["steps"].append(got)
    show(arms, phase)


def long_turns(arms: list[Served], phase: str, first: int, shrink: int, between: str = "") -> None:
    """Each arm alone for some seconds, as users would be on it; nothing of it is in any cache. Then what its own GPU has."""
    n = 8000 // shrink
    for again in range(2):
        if again and between:
            subprocess.run(between, shell=True, check=True, timeout=60)
        for number, arm in enumerate(arms if again % 2 else arms[::-1]):
            seed = first + 1000 * again + 100 * number
            began = time.time()
            got = arm.steps(seed, 16, n)
            results["steps"].append({"phase": phase, "round": again, "began": began, **got})
            began = time.time()
            got = arm.steps(seed + 12, STREAMS, n)
            results["steps"].append({"phase": f"{phase}, in its GPU", "round": again, "began": began, "ended": time.time(), **got})
    show(arms, phase)
    show(arms, f"{phase}, in its GPU")


def profiles(arms: list[Served], first: int, shrink: int) -> None:
    for number, arm in enumerate(arms):
        arm.steps(first + 100 * number, STREAMS, 8000 // shrink)
        profile(arm, first + 100 * number, 8000 // shrink)


def show(arms: list[Served], phase: str) -> None:
    rows = [r for r in results["steps"] if r["phase"] == phase]
    plain = statistics.median(r["p50"] for r in rows if r["arm"] == arms[0].name)
    for arm in arms:
        of = [r for r in rows if r["arm"] == arm.name]
        p50, cpu, switches = (statistics.median(r[k] for r in of) for k in ("p50", "cpu_ms", "switches"))
        low, high = min(r["p50"] for r in of), max(r["p50"] for r in of)
        row(
            f"{phase}: {arm.name}",
            f"p50 {p50:.3f} ms ({low:.3f} to {high:.3f}), {p50 / plain:.4f} of plain; "
            f"{cpu:.2f} ms of processor and {switches:.1f} switches a step, cores {[r['core'] for r in of]}",
        )


def fill(arms: list[Served], seed: int, shrink: int) -> None:
    for arm in arms:
        for i in range(6):
            arm.answer(seed + i, 8000 // shrink, 8)
    time.sleep(1.0)


def profile(arm: Served, seed: int, n: int) -> None:
    """Kernels of some decoding steps behind prompts that its GPU has, from vLLM's own profiler."""
    arm.post("/start_profile")
    with ThreadPoolExecutor(STREAMS) as pool:
        list(pool.map(lambda i: arm.answer(seed + i, n, 40), range(STREAMS)))
    arm.post("/stop_profile")
    files = sorted(arm.profiles.rglob("*.json*"), key=lambda f: f.stat().st_size)
    raw = files[-1].read_bytes()
    events = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)["traceEvents"]
    work = sorted(
        (e["ts"], e["dur"], e["name"], e["cat"])
        for e in events
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    if not work:
        row(f"profile {arm.name}", "no kernels: not on a GPU?")
        return
    work = work[len(work) // 3 :]  # the steps with prompts in them are the first ones
    by_name: dict[str, list[float]] = defaultdict(list)
    for _, duration, name, _ in work:
        by_name[name].append(duration)
    busy, end, gaps = 0.0, work[0][0], []
    for ts, duration, name, _ in work:
        if ts > end:
            gaps.append((ts - end, name))
        busy += max(0.0, ts + duration - max(ts, end))
        end = max(end, ts + duration)
    span = end - work[0][0]
    long = sum(g for g, _ in gaps if g > 20)
    top = sorted(by_name.items(), key=lambda x: -sum(x[1]))[:12]
    results[f"profile {arm.name}"] = {
        "span_us": span, "busy_us": busy, "long_gaps_us": long, "kernels": len(work),
        "before_long_gaps": sorted(gaps, reverse=True)[:20],
        "top": [(name[:120], len(d), sum(d), statistics.median(d)) for name, d in top],
    }  # fmt: skip
    row(
        f"profile {arm.name}",
        f"{len(work)} kernels in {span / 1e3:.1f} ms: {100 * busy / span:.1f} % busy, gaps over 20 us "
        f"{100 * long / span:.1f} %, shorter ones {100 * (span - busy - long) / span:.1f} %",
    )
    for name, durations in top[:6]:
        row(f"   {name[:70]}", f"{len(durations)} x {statistics.median(durations):.1f} us")


class Arms:
    """Those that were asked for, and of them those that are up; every process that was started is ended by close()."""

    START_S = 150.0  # several at once; one that takes longer is left out

    def __init__(self, args: argparse.Namespace, socket: str) -> None:
        ours = {
            "kv_connector": "PdserveConnector", "kv_connector_module_path": "pdserve.engines.vllm.connector",
            "kv_connector_extra_config": {"pdserve.socket": socket, "pdserve.load": "always"},
        }  # fmt: skip
        one = {**ours, "kv_connector_extra_config": {**ours["kv_connector_extra_config"], "pdserve.second_context": False}}
        null = {"kv_connector": "NullConnector", "kv_connector_module_path": "null_connector"}
        size = {"kv_connector_extra_config": {"cpu_bytes_to_use": args.peers_gib << 30}}
        known: dict[str, tuple[dict | None, tuple[str, ...]]] = {
            "plain": (None, ()),
            "plain again": (None, ()),
            "plain without hma": (None, ("--disable-hybrid-kv-cache-manager",)),
            "null": (null, ()),
            "ours": (ours, ()),
            "ours+one": (one, ()),
            "lmcache": ({"kv_connector": "LMCacheConnectorV1"}, ()),
            "offloading": ({"kv_connector": "OffloadingConnector", **size}, ()),
        }
        self._wanted: list[tuple] = [(name, known[name][0], "", known[name][1]) for name in args.arms.split(",")]
        for name, where in (v.split("=", 1) for v in args.variant):
            folder, *settings = where.split(",")
            self._wanted.append((name, ours, folder, (), dict(s.split("=", 1) for s in settings)))
        self._args, self._made = args, list[Served]()
        self.up: list[Served] = []

    def start(self, count: int | None = None) -> None:
        """The next so many, or all that are left, side by side; RuntimeError when none at all is up then."""
        first = len(self._made)
        for name, *rest in self._wanted[first:] if count is None else self._wanted[first : first + count]:
            self._made.append(Served(name, self._args, self._args.port + 7 * len(self._made), *rest))
        until = time.monotonic() + self.START_S
        for number, arm in enumerate(self._made[first:], first):
            if arm.up(until):
                arm.steps(1 + 10 * number)  # the first is a warm-up
                self.up.append(arm)
            else:
                row(arm.name, "did not start, see its log")
        if not self.up:
            raise RuntimeError("no engine is up")

    def close(self) -> None:
        for arm in self._made:
            arm.process.terminate()
        for arm in self._made:
            try:
                arm.process.wait(15)
            except subprocess.TimeoutExpired:
                arm.process.kill()


def short_turns(arms: list[Served], args: argparse.Namespace, until: float) -> None:
    for phase, prepare in (
        ("fresh", lambda: None),
        ("stored", lambda: fill(arms, 700000, args.shrink)),
        ("loaded", lambda: [arm.post("/reset_prefix_cache") for arm in arms] and fill(arms, 700000, args.shrink)),
    ):
        if time.monotonic() > until - 40:
            row(phase, "left out, no time is left")
            continue
        prepare()
        measure(arms, phase, 100000 + 10000 * len(results["steps"]))


def run(arms: Arms, args: argparse.Namespace, until: float) -> None:
    phases = args.only.split(",")
    if "alone" in phases:
        arms.start(1)
        long_turns(arms.up, "alone", 800000, args.shrink, args.between)
    arms.start()
    if "short" in phases:
        short_turns(arms.up, args, until)
    for phase, seconds, work in (
        ("long", 20 * len(arms.up), lambda: long_turns(arms.up, "long turn", 900000, args.shrink)),
        ("profile", 8 * len(arms.up), lambda: profiles(arms.up, 950000, args.shrink)),
    ):
        if phase in phases and time.monotonic() < until - 10 - seconds:
            work()
        elif phase in phases:
            row(phase, "left out, no time is left")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--gpu", default="0")
    more = "also: plain without hma, ours+one (without its second CUDA context), lmcache, offloading"
    parser.add_argument("--arms", default="plain,plain again,null,ours", help=more)
    parser.add_argument("--only", default="short,long,profile", help="phases (default %(default)s)")
    parser.add_argument("--peers-gib", type=int, default=24, help="host memory of each peer (default %(default)s)")
    parser.add_argument("--port", type=int, default=8400)
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=FOLDER[,KEY=VALUE]", help="with such a setting")
    parser.add_argument("--between", default="", help="command to run between the turns of the first arm alone")
    parser.add_argument("--cache", default="24GiB")
    parser.add_argument("--kv-gib", type=float, default=9, help="of each engine (default %(default)s)")
    parser.add_argument("--shrink", type=int, default=1, help="prompts so many times shorter: to try it without a GPU")
    parser.add_argument("--budget", type=float, default=330, help="seconds for everything (default %(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    keep_in(args.out / "decode.json")
    until = time.monotonic() + args.budget
    cache, socket = daemon(f"decode-{args.port}", args.cache, args.port + 99, args.out)
    arms = Arms(args, socket)
    try:
        run(arms, args, until)
    finally:
        arms.close()
        cache.terminate()
        cache.wait(20)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

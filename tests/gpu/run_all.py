"""Builds, checks and measures the GPU path on one GPU: run_all.py --model DIR [--small DIR] --out DIR   (under 9 minutes)

--model: a folder with config.json (and tokenizer files) of the model to measure, loaded with dummy weights; --small: a real
small model, for greedy tokens. Steps run in the order of STEPS, each with a deadline of its own and only while its seconds are
left of --budget; results.json is written after each figure, the short table comes last. --dry-run starts nothing and needs no
GPU: it prints the plan and checks what can be checked without one. docs/gpu-runbook.md says what to run in which order.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
results: dict = {}
table: list[tuple[str, str]] = []
out_file: Path | None = None
TEXTS = [
    "The history of the city begins with a small harbour on the river. " * n + "In one sentence, the city is"
    for n in (20, 45, 61, 88)
]


def row(what: str, figure: str) -> None:
    table.append((what, figure))
    print(f"## {what}: {figure}", flush=True)
    write()


def write() -> None:
    if out_file is not None:
        out_file.write_text(json.dumps({**results, "table": table}, indent=1))


class Engine:
    """One engine_probe.py. Every answer has a deadline; one that does not come ends the engine."""

    ports = 29500  # engines that start at the same moment would otherwise choose the same one
    START_S = 240.0

    def __init__(self, name: str, out: Path, **options) -> None:
        self.name = name
        self._log = (out / f"{name}.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "engine_probe.py"), json.dumps({"name": name, **options})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, "PYTHONSAFEPATH": "1", "VLLM_PORT": str(Engine.ports)},
        )  # fmt: skip
        Engine.ports += 100
        self._answers: queue.Queue[dict | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith("@@"):
                self._answers.put(json.loads(line[2:]))
            else:
                self._log.write(line)
        self._answers.put(None)

    def answer(self, seconds: float) -> dict:
        try:
            found = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.process.kill()
            raise RuntimeError(f"{self.name}: no answer within {seconds:.0f} s") from None
        if found is None:
            raise RuntimeError(f"engine {self.name} ended; see its log")
        if "error" in found:
            raise RuntimeError(f"{self.name}: {found['error']}")
        return found

    def ready(self) -> Engine:
        results[f"start_{self.name}_s"] = self.answer(self.START_S)["ready"]
        write()
        return self

    def do(self, name: str, seconds: float = 60, **arguments) -> dict:
        self.process.stdin.write(json.dumps({"do": name, **arguments}) + "\n")
        self.process.stdin.flush()
        return self.answer(seconds)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()


def daemon(name: str, size: str, port: int, out: Path) -> tuple[subprocess.Popen, str]:
    socket = f"/tmp/pdserve-{name}.sock"
    log = (out / f"cache-{name}.log").open("w")
    command = [sys.executable, "-m", "pdserve", "cache", "serve", "--socket", socket, "--size", size]
    process = subprocess.Popen(
        [*command, "--admin-port", str(port), "--name", name],
        stdout=log,
        stderr=log,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    end = time.monotonic() + 90
    while not Path(socket).exists():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the cache daemon did not start; see {log.name}")
        time.sleep(0.2)
    return process, socket


def copies(run: Run) -> None:
    subprocess.run(
        [sys.executable, str(HERE / "bench_copies.py"), str(run.out / "copies.json")], check=True, timeout=run.left
    )
    c = results["copies"] = json.loads((run.out / "copies.json").read_text())
    for way, ours in (
        ("d2h", "(b) store: gather, staging, DMA, digest made"),
        ("h2d", "(b) load: DMA, staging, scatter, digest checked"),
    ):
        bus = max(c[f"copy pinned {way}"]["gb_s"], c[f"copy arena {way}"]["gb_s"])
        what = ours.split(":")[0][4:]
        row(f"{what} 20k tokens", f"{c[ours]['gb_s']:.1f} of {bus:.1f} GB/s = {c[ours]['gb_s'] / bus:.3f}")
        for payload in ("int8", "fp8"):
            got = c[f"{what} as {payload}"]["ms_median"]
            row(f"{what} 20k tokens as {payload}", f"{got:.1f} ms, as it is {c[ours]['ms_median']:.1f} ms")


def kernel_tests(run: Run) -> None:
    words = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_blocks.py")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=run.left, check=False)
    results["kernel_tests"] = done.stdout[-3000:]
    row("kernel tests", done.stdout.strip().splitlines()[-1] if done.stdout.strip() else f"exit {done.returncode}")


def sanitizer(run: Run) -> None:
    """memcheck and racecheck of each kind of kernel, a few sizes of each."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    some = "equal_plain_indexing and 77 and (NHD or MLA) or rounded and 45"
    for check in ("memcheck", "racecheck"):
        words = [
            tool,
            "--tool",
            check,
            "--error-exitcode",
            "9",
            sys.executable,
            "-P",
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
        ]
        words += [str(HERE / "test_blocks.py"), "-k", some]
        done = subprocess.run(words, capture_output=True, text=True, timeout=run.left, check=False)
        said = [line for line in done.stdout.splitlines() if "SUMMARY" in line or " passed" in line]
        results[check] = done.stdout[-3000:]
        row(f"compute-sanitizer {check}", "; ".join(said) or f"exit {done.returncode}: {done.stderr[-200:]}")


def peers(run: Run) -> None:
    """The same 20k prompt from the others' DRAM; each has an engine of its own, after ours have stopped."""
    for name in ("offloading", "lmcache"):
        try:
            engine = run.engine(f"peer-{name}", peer=name, **run.big)
            for seed, n in ((1, 2000), (2, 10000)):
                engine.do("generate", seeds=[seed], n=n, out=4)
            reused, cold = [], []
            for seed in range(31, 34):
                cold.append(engine.do("generate", seeds=[seed], n=20000, out=1)["ms"])
                time.sleep(1)
                engine.do("reset")
                reused.append(engine.do("generate", seeds=[seed], n=20000, out=1)["ms"])
            rates = [
                engine.do("generate", seeds=list(range(a, a + 24)), n=4000, out=64)["tok_s"]
                for a in (50100, 50200, 50300)
            ]
            results[f"peer_{name}"] = {"reused_ms": reused, "cold_ms": cold, "new_tok_s": rates}
            figures = f"reused {statistics.median(reused):.1f}, cold {statistics.median(cold):.1f}"
            row(f"{name}: TTFT 20k, ms", f"{figures}; 24 x 4000 + 64 new: {statistics.median(rates):.1f} tok/s")
            engine.stop()
        except (RuntimeError, OSError) as e:
            row(name, f"FAILED {e}")


def payload(run: Run) -> None:
    """An engine that stores int8: TTFT from DRAM, and that what is loaded is what was stored."""
    engine = run.engine("int8", connector=True, socket=run.socket, payload="int8", **run.big)
    for seed, n in ((1, 2000), (2, 20000)):
        engine.do("generate", seeds=[seed], n=n, out=4)
    found = []
    for seed in range(41, 44):
        engine.do("generate", seeds=[seed], n=20000, out=1)
        engine.do("settle")
        engine.do("reset")
        found.append(engine.do("generate", seeds=[seed], n=20000, out=1)["ms"])
    same = engine.do("check_kv")
    results["int8"] = {"dram_ms": found, "kv": same}
    row(
        "TTFT 20k tokens stored as int8, ms",
        f"{statistics.median(found):.1f}; blocks = arena: {same['equal']} of {same['chunks']}",
    )
    engine.stop()


def tokens_agree(run: Run) -> None:
    """The real model: plain vLLM, computed with pdserve, and loaded from DRAM say the same."""
    if run.small is None:
        return
    tiny = {"model": run.small, "kv_gib": 2, "load_format": "auto", "max_model_len": 2048, "dtype": "float32"}
    small, reference = run.engines(("small", {"connector": True, "socket": run.socket, **tiny}), ("small-plain", tiny))
    plain, cold, loaded, cached = [], [], [], []
    for text in TEXTS:
        plain += reference.do("generate", seeds=[], n=0, out=48, texts=[text])["tokens"]
        cold += small.do("generate", seeds=[], n=0, out=48, texts=[text])["tokens"]
    small.do("settle")
    emptied = small.do("reset")["reset"]
    small.do("rates")
    for text in TEXTS:
        got = small.do("generate", seeds=[], n=0, out=48, texts=[text])
        loaded += got["tokens"]
        cached += got["cached"]
    results["tokens"] = {"plain": plain, "cold": cold, "loaded": loaded, "cached": cached, "emptied": emptied}
    same = sum(a == b for a, b in zip(plain, loaded, strict=True))
    computed = sum(a == b for a, b in zip(plain, cold, strict=True))
    row(
        "greedy tokens, real model float32, loaded = plain",
        f"{same} of {len(plain)} (cached {cached}); computed = plain {computed}",
    )
    results["tokens_kv"] = small.do("check_kv")
    for engine in (small, reference):
        engine.stop()


def first_token(run: Run) -> None:
    """TTFT cold, from the GPU's cache, from DRAM after the GPU's cache is emptied; one token out."""
    ours, plain = run.pair()
    found: dict = results.setdefault("ttft", {})
    for e in (ours, plain):
        for seed, n in ((1, 2000), (2, 10000)):
            e.do("generate", seeds=[seed], n=n, out=4)
    for n in (2000, 10000, 20000, 30000):
        entry = found[n] = {
            "cold": [],
            "gpu": [],
            "dram": [],
            "plain_cold": [],
            "plain_gpu": [],
            "load_ms": [],
            "store_ms": [],
        }
        for again in range(4 if n == 20000 else 2):
            seed = n + again
            ours.do("rates")
            entry["cold"].append(ours.do("generate", seeds=[seed], n=n, out=1)["ms"])
            ours.do("settle")
            entry["store_ms"].append(ours.do("rates")["stores"])
            entry["gpu"].append(ours.do("generate", seeds=[seed], n=n, out=1)["ms"])
            ours.do("settle")
            reset = ours.do("reset")["reset"]
            warm = ours.do("generate", seeds=[seed], n=n, out=1)
            entry["dram"].append(warm["ms"])
            entry.setdefault("cached", []).append([reset, *warm["cached"]])
            entry["load_ms"].append(ours.do("rates")["loads"])
            entry["plain_cold"].append(plain.do("generate", seeds=[seed], n=n, out=1)["ms"])
            entry["plain_gpu"].append(plain.do("generate", seeds=[seed], n=n, out=1)["ms"])
        ours.do("settle")
        m = {
            k: statistics.median(v) for k, v in entry.items() if k in ("cold", "gpu", "dram", "plain_cold", "plain_gpu")
        }
        row(
            f"TTFT {n} tokens, ms",
            f"DRAM {m['dram']:.1f}, GPU cache {m['gpu']:.1f} (plain {m['plain_gpu']:.1f}), "
            f"cold {m['cold']:.1f} (plain {m['plain_cold']:.1f})",
        )
    ours.do("reset")
    ours.do("rates")
    ours.do("generate", seeds=[20000], n=20000, out=1)
    results["kv_bytes"] = ours.do("check_kv")
    row(
        "KV in the engine's blocks = arena, chunks",
        f"{results['kv_bytes']['equal']} of {results['kv_bytes']['chunks']}",
    )


def throughput(run: Run) -> None:
    ours, plain = run.pair()
    found = results["throughput"] = {"new": [], "new_plain": [], "cached": [], "cached_plain": []}
    fixed = list(range(70000, 70024))
    for again in range(run.rounds + 1):
        order = (("new", ours), ("new_plain", plain))
        for name, engine in order if again % 2 else order[::-1]:
            seeds = list(range(50000 + 100 * again, 50024 + 100 * again))
            got = engine.do("generate", seeds=seeds, n=4000, out=64)["tok_s"]
            if again:  # the first is a warm-up
                found[name].append(got)
    for e in (ours, plain):
        e.do("reset")
        e.do("generate", seeds=fixed, n=4000, out=64)
    for again in range(run.rounds):
        order = (("cached", ours), ("cached_plain", plain))
        for name, engine in order if again % 2 else order[::-1]:
            found[name].append(engine.do("generate", seeds=fixed, n=4000, out=64)["tok_s"])
    for what, name in (("nothing to reuse", "new"), ("all in the GPU cache", "cached")):
        a, b = statistics.median(found[name]), statistics.median(found[f"{name}_plain"])
        each = statistics.median(x / y for x, y in zip(found[name], found[f"{name}_plain"], strict=True))
        row(
            f"24 x 4000 + 64, {what}, tok/s",
            f"{a:.1f} of plain {b:.1f} = {a / b:.3f}; median of pairs {each:.3f} of {run.rounds}",
        )


STORING, LOADING = "store:direct:512", "load:dma:32"  # as the engine does while it generates
DISTURBED = (
    STORING, LOADING, f"{STORING}+{LOADING}", "load:dma:8", "load:dma:16", "load:dma:132", "load:direct:1024",
    "store:direct:1024", "store:dma:32",
)  # fmt: skip


def between_tokens(run: Run) -> None:
    ours, plain = run.pair()
    found: dict = results.setdefault("itl", {})
    for again in range(3):
        found.setdefault("plain", []).append(plain.do("itl", streams=8, out=260, seed=again))
        for n, how in enumerate(DISTURBED):
            # Beside each an idle one: the machine is not the same for a minute.
            seed = 20 + 10 * n + again
            found.setdefault(f"idle, {how}", []).append(ours.do("itl", streams=8, out=200, seed=seed + 500))
            found.setdefault(how, []).append(ours.do("itl", streams=8, out=200, seed=seed, disturb=how))
            write()
    for how in DISTURBED:
        ratios = {
            q: statistics.median(a[q] / b[q] for a, b in zip(found[how], found[f"idle, {how}"], strict=True))
            for q in ("p50", "p99")
        }
        m = sorted(found[how], key=lambda x: x["p99"])[1]
        row(
            f"ITL of 8 streams, p50 / p99, {how}",
            f"{m['p50']:.2f} / {m['p99']:.2f} ms = {ratios['p50']:.3f} / {ratios['p99']:.3f} of idle "
            f"(store {m['stored_gb_s']:.1f}, load {m['loaded_gb_s']:.1f} GB/s)",
        )
    idle = [x for how in DISTURBED for x in found[f"idle, {how}"]]
    for name, runs in (("idle", idle), ("plain vLLM", found["plain"])):
        p50, p99 = (statistics.median(x[q] for x in runs) for q in ("p50", "p99"))
        row(f"ITL of 8 streams, p50 / p99, {name}", f"{p50:.2f} / {p99:.2f} ms")


def overhead(run: Run) -> None:
    """Plain, a connector that does nothing, and pdserve, in turn; and the time in each of pdserve's methods."""
    size = {"model": run.model, "kv_gib": 18}
    names = ("plain2", "null", "pdserve2")
    options: list[dict] = [size, {"peer": "null", **size}, {"connector": True, "socket": run.socket, **size}]
    engines = dict(zip(names, run.engines(*zip(names, options, strict=True)), strict=True))
    found: dict = results.setdefault(
        "overhead", {name: {"new": [], "cached": [], "p50": [], "p99": []} for name in names}
    )
    fixed = list(range(80000, 80008))
    for e in engines.values():
        e.do("generate", seeds=fixed, n=4000, out=64)
    for again in range(run.rounds + 1):
        for name in (names, names[::-1])[again % 2]:
            e, entry = engines[name], found[name]
            seeds = list(range(90000 + 100 * again, 90024 + 100 * again))
            new = e.do("generate", seeds=seeds, n=4000, out=64)["tok_s"]
            e.do("generate", seeds=fixed, n=4000, out=4)  # back into the GPU's cache
            cached = e.do("generate", seeds=fixed, n=4000, out=64)["tok_s"]
            gaps = e.do("itl", streams=8, out=300, seed=again)
            if again:
                entry["new"].append(new)
                entry["cached"].append(cached)
                entry["p50"].append(gaps["p50"])
                entry["p99"].append(gaps["p99"])
    for what in ("new", "cached", "p50", "p99"):
        ratio = {
            n: statistics.median(a / b for a, b in zip(found[n][what], found["plain2"][what], strict=True))
            for n in names[1:]
        }
        m = {n: statistics.median(found[n][what]) for n in names}
        row(
            f"of plain, {what}",
            f"null {ratio['null']:.3f}, pdserve {ratio['pdserve2']:.3f} (plain {m['plain2']:.2f}; medians of {run.rounds} pairs)",
        )
    ours = engines["pdserve2"]
    ours.do("watch_calls")
    for what, ask in (
        ("decoding", {"seeds": fixed, "n": 500, "out": 300}),
        ("new", {"seeds": list(range(95000, 95024)), "n": 4000, "out": 64}),
    ):
        ours.do("calls")
        seconds = ours.do("generate", **ask)["ms"] / 1e3
        calls = results[f"calls {what}"] = ours.do("calls")
        steps = calls["scheduler build_connector_meta"][0]
        top = ", ".join(f"{name} {ms / steps * 1e3:.0f}" for name, (_, ms) in list(calls.items())[:6])
        row(
            f"in the connector, {what}, us a step",
            f"{sum(ms for _, ms in calls.values()) / steps * 1e3:.0f} of {seconds / steps * 1e6:.0f}: {top}",
        )
    for e in engines.values():
        e.stop()


@dataclass(frozen=True)
class Step:
    name: str
    work: Callable[[Run], None]
    seconds: float  # what it takes at most; it is left out where less is left
    shows: str


#: in order of value: what comes first has the time
STEPS = (
    Step("copies", copies, 75, "store and load beside the bus, and with 8 bits a value; builds the kernels"),
    Step(
        "ttft",
        first_token,
        170,
        "first token from DRAM at 2k, 10k, 20k, 30k tokens, beside plain vLLM; KV byte by byte; with the start",
    ),
    Step("throughput", throughput, 110, "nothing to reuse and all in the GPU's cache, interleaved with plain vLLM"),
    Step("itl", between_tokens, 110, "time between tokens of 8 streams while 20k tokens are stored or loaded"),
    Step("tokens", tokens_agree, 90, "greedy tokens of the real model: loaded = computed = plain"),
    Step(
        "overhead", overhead, 200, "a connector that does nothing beside pdserve, and the time in each of its methods"
    ),
    Step("tests", kernel_tests, 60, "kernels against plain indexing, bit for bit"),
    Step("sanitizer", sanitizer, 90, "memcheck and racecheck of the kernels"),
    Step("payload", payload, 110, "an engine that stores int8"),
    Step("peers", peers, 220, "OffloadingConnector and LMCache at 20k tokens"),
)


@dataclass
class Run:
    out: Path
    model: str
    small: str | None
    socket: str
    until: float
    rounds: int = 5
    started: dict[str, Engine] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return max(1.0, self.until - time.monotonic())

    @property
    def big(self) -> dict:
        return {"model": self.model, "kv_gib": 26}

    def engines(self, *named: tuple[str, dict]) -> list[Engine]:
        """Started side by side."""
        made = [Engine(name, self.out, **options) for name, options in named]
        self.started |= {e.name: e for e in made}
        return [e.ready() for e in made]

    def engine(self, name: str, **options) -> Engine:
        return self.engines((name, options))[0]

    def pair(self) -> tuple[Engine, Engine]:
        """Ours and the plain one, started by the step that needs them first."""
        if "pdserve" not in self.started:
            self.engines(("pdserve", {"connector": True, "socket": self.socket, **self.big}), ("plain", self.big))
        return self.started["pdserve"], self.started["plain"]

    def end_pair(self) -> None:
        for name in ("pdserve", "plain"):
            if name in self.started:
                self.started[name].stop()


def chosen(only: str, skip: str) -> list[Step]:
    wanted, unwanted = [w for w in only.split(",") if w], skip.split(",")
    unknown = ({*wanted, *unwanted} - {""}) - {s.name for s in STEPS}
    if unknown:
        raise SystemExit(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in STEPS)}")
    return [s for s in STEPS if (not wanted or s.name in wanted) and s.name not in unwanted]


def dry_run(steps: list[Step], args: argparse.Namespace) -> int:
    """The plan, and whether what it needs is here."""
    left, bad = args.budget, 0
    for step in steps:
        fits = step.seconds <= left
        left -= step.seconds if fits else 0
        print(f"{step.name:12} {step.seconds:4.0f} s  {'' if fits else '(only if others take less)  '}{step.shows}")
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted(HERE.glob("*.py")):
            ok = compileall.compile_file(file, ddir=folder, quiet=1, legacy=False)
            bad += not ok
    from pdserve.kernels import build

    for what, there in (
        ("model's config.json", (Path(args.model) / "config.json").is_file()),
        ("small model", args.small is None or (Path(args.small) / "config.json").is_file()),
        ("nvcc", build.gpu_compiler("sm_90") is not None),
    ):
        bad += not there
        print(f"{'found' if there else 'MISSING'}: {what}")
    return 1 if bad else 0


def main() -> int:
    global out_file
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--small")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--cache", default="24GiB")
    parser.add_argument("--only", default="", help=f"comma-separated, of {','.join(s.name for s in STEPS)}")
    parser.add_argument("--skip", default="", help="the same")
    parser.add_argument("--budget", type=float, default=520, help="seconds for everything (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of the step throughput (default %(default)s)")
    parser.add_argument(
        "--lane", type=int, default=0, help="of several runs side by side on one host, which one: sets ports and names"
    )
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    steps = chosen(args.only, args.skip)
    if args.dry_run:
        return dry_run(steps, args)
    args.out.mkdir(parents=True, exist_ok=True)
    out_file, begun = args.out / "results.json", time.monotonic()
    cache, socket = daemon(f"gpu{args.lane}", args.cache, 8080 + args.lane, args.out)
    Engine.ports += 800 * args.lane
    run = Run(args.out, args.model, args.small, socket, begun + args.budget, args.rounds)
    try:
        for step in steps:
            if run.left < step.seconds:
                row(step.name, f"left out: {run.left:.0f} s are left, it takes up to {step.seconds:.0f}")
                continue
            if step.name not in ("copies", "ttft", "throughput", "itl"):
                run.end_pair()  # the rest needs the memory
            try:
                step.work(run)
            except Exception as e:  # noqa: BLE001 - the other steps still count
                results[f"{step.name}_error"] = f"{type(e).__name__}: {e}"
                row(step.name, f"FAILED {type(e).__name__}: {e}")
            print(f"{step.name} done after {time.monotonic() - begun:.0f} s", flush=True)
    finally:
        for engine in run.started.values():
            engine.process.kill()
        cache.terminate()
        try:
            cache.wait(20)
        except subprocess.TimeoutExpired:
            cache.kill()
        results["seconds"] = time.monotonic() - begun
        write()
        print()
        for what, figure in table:
            print(f"{what:52} {figure}")
    return 1 if any(figure.startswith("FAILED") for _, figure in table) else 0


if __name__ == "__main__":
    raise SystemExit(main())

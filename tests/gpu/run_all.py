"""Builds, checks and measures the GPU path on one GPU: run_all.py --model DIR [--small DIR] --out DIR   (under 9 minutes)

--model: a folder with config.json (and tokenizer files) of the model to measure, loaded with dummy weights; --small: a real
small model, for greedy tokens. Ends with a short table; results.json has everything, with the versions and the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
results: dict = {}
table: list[tuple[str, str]] = []
TEXTS = [
    "The history of the city begins with a small harbour on the river. " * n + "In one sentence, the city is"
    for n in (20, 45, 61, 88)
]


def row(what: str, figure: str) -> None:
    table.append((what, figure))
    print(f"## {what}: {figure}", flush=True)


class Engine:
    ports = 29500  # engines that start at the same moment would otherwise choose the same one

    def __init__(self, name: str, out: Path, **options) -> None:
        self.name = name
        self._log = (out / f"{name}.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "engine_probe.py"), json.dumps({"name": name, **options})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env={**os.environ, "PYTHONSAFEPATH": "1", "VLLM_PORT": str(Engine.ports)},
        )  # fmt: skip
        Engine.ports += 100

    def answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("@@"):
                found = json.loads(line[2:])
                if "error" in found:
                    raise RuntimeError(f"{self.name}: {found['error']}")
                return found
            self._log.write(line)
        raise RuntimeError(f"engine {self.name} ended; see its log")

    def do(self, name: str, **arguments) -> dict:
        self.process.stdin.write(json.dumps({"do": name, **arguments}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
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


def copies(out: Path) -> None:
    subprocess.run([sys.executable, str(HERE / "bench_copies.py"), str(out / "copies.json")], check=True, timeout=120)
    c = results["copies"] = json.loads((out / "copies.json").read_text())
    for way, ours in (
        ("d2h", "(b) store: gather, staging, DMA, digest made"),
        ("h2d", "(b) load: DMA, staging, scatter, digest checked"),
    ):
        bus = max(c[f"copy pinned {way}"]["gb_s"], c[f"copy arena {way}"]["gb_s"])
        row(
            f"{ours.split(':')[0][4:]} 20k tokens",
            f"{c[ours]['gb_s']:.1f} of {bus:.1f} GB/s = {c[ours]['gb_s'] / bus:.3f}",
        )


def tokens_agree(small: Engine, reference: Engine) -> None:
    """The real model: plain vLLM, computed with pdserve, and loaded from DRAM say the same."""
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


def first_token(ours: Engine, plain: Engine) -> None:
    """TTFT cold, from the GPU's cache, from DRAM after the GPU's cache is emptied; one token out."""
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


def throughput(ours: Engine, plain: Engine) -> None:
    found = results["throughput"] = {"new": [], "new_plain": [], "cached": [], "cached_plain": []}
    fixed = list(range(70000, 70024))
    for again in range(6):
        order = (("new", ours), ("new_plain", plain))
        for name, engine in order if again % 2 else order[::-1]:
            got = engine.do("generate", seeds=list(range(50000 + 100 * again, 50024 + 100 * again)), n=4000, out=64)[
                "tok_s"
            ]
            if again:  # the first is a warm-up
                found[name].append(got)
    for e in (ours, plain):
        e.do("reset")
        e.do("generate", seeds=fixed, n=4000, out=64)
    for again in range(5):
        order = (("cached", ours), ("cached_plain", plain))
        for name, engine in order if again % 2 else order[::-1]:
            found[name].append(engine.do("generate", seeds=fixed, n=4000, out=64)["tok_s"])
    for what, name in (("nothing to reuse", "new"), ("all in the GPU cache", "cached")):
        a, b = statistics.median(found[name]), statistics.median(found[f"{name}_plain"])
        row(f"24 x 4000 + 64, {what}, tok/s", f"{a:.1f} of plain {b:.1f} = {a / b:.3f}")


def between_tokens(ours: Engine, plain: Engine) -> None:
    found: dict = {}
    results["itl"] = found
    for again in range(2):
        found.setdefault("plain", []).append(plain.do("itl", streams=8, out=260, seed=again))
        found.setdefault("idle", []).append(ours.do("itl", streams=8, out=260, seed=10 + again))
        for n, how in enumerate(
            (
                "direct:256 store",
                "direct:512 store",
                "direct:1024 store",
                "dma store",
                "dma load",
                "direct:1024 load",
                "direct:512 both",
            )
        ):
            if not again or how == "direct:1024 store":
                found.setdefault(how, []).append(
                    ours.do("itl", streams=8, out=200, seed=20 + 10 * n + again, disturb=how)
                )
                print(how, found[how][-1], flush=True)
    best = {k: min(v, key=lambda x: x["p99"]) for k, v in found.items()}
    for how in (
        "direct:256 store",
        "direct:512 store",
        "direct:1024 store",
        "dma store",
        "dma load",
        "direct:1024 load",
        "direct:512 both",
    ):
        m = best[how]
        row(
            f"ITL p50 / p99 while {how}, ms",
            f"{m['p50']:.2f} / {m['p99']:.2f} (store {m['stored_gb_s']:.1f}, load {m['loaded_gb_s']:.1f} GB/s)",
        )
    m = best["direct:1024 store"]
    row(
        "ITL of 8 streams p50 / p99, ms",
        f"storing {m['p50']:.2f} / {m['p99']:.2f} (store {m['stored_gb_s']:.1f}, load {m['loaded_gb_s']:.1f} GB/s), "
        f"idle {best['idle']['p50']:.2f} / {best['idle']['p99']:.2f}, plain {best['plain']['p50']:.2f} / {best['plain']['p99']:.2f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--small")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--cache", default="24GiB")
    parser.add_argument("--skip", default="", help="comma-separated: copies,tokens,ttft,throughput,itl")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    skip, begun = args.skip.split(","), time.time()
    engines: list[Engine] = []
    cache, socket = daemon("gpu", args.cache, 8080, args.out)
    try:
        big = {"model": args.model, "kv_gib": 26}
        ours, plain = (
            Engine("pdserve", args.out, connector=True, socket=socket, **big),
            Engine("plain", args.out, **big),
        )
        engines += [ours, plain]
        pair = []
        if args.small and "tokens" not in skip:
            tiny = {"model": args.small, "kv_gib": 2, "load_format": "auto", "max_model_len": 2048}
            tiny["dtype"] = "float32"
            pair = [
                Engine("small", args.out, connector=True, socket=socket, **tiny),
                Engine("small-plain", args.out, **tiny),
            ]
        for e in engines:
            results[f"start_{e.name}_s"] = e.answer()["ready"]
        try:
            for e in pair:
                results[f"start_{e.name}_s"] = e.answer()["ready"]
        except RuntimeError as e:
            row("greedy tokens", f"FAILED {e}")
            pair = []
        engines += pair
        print("engines up after", round(time.time() - begun, 1), flush=True)
        for name, part in (
            ("tokens", lambda: tokens_agree(*pair) if pair else None),
            ("ttft", lambda: first_token(ours, plain)),
            ("throughput", lambda: throughput(ours, plain)),
            ("itl", lambda: between_tokens(ours, plain)),
        ):
            if name in skip:
                continue
            try:
                part()
            except Exception as e:  # noqa: BLE001 - the other parts still count
                results[f"{name}_error"] = f"{type(e).__name__}: {e}"
                row(name, f"FAILED {e}")
            print(name, "done after", round(time.time() - begun, 1), flush=True)
            (args.out / "results.json").write_text(json.dumps(results, indent=1))
        for e in engines:
            e.stop()
        if "copies" not in skip:
            copies(args.out)
    finally:
        for e in engines:
            e.process.kill()
        cache.terminate()
        cache.wait(20)
        results["seconds"] = time.time() - begun
        results["table"] = table
        (args.out / "results.json").write_text(json.dumps(results, indent=1))
        print()
        for what, figure in table:
            print(f"{what:52} {figure}")


if __name__ == "__main__":
    main()

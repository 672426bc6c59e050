"""Steps of run_all.py about what a user waits for: the first token, and the time between tokens."""

from __future__ import annotations

import statistics

from gpu_session import Engine, Run, results, row, write

from pdserve.engines.vllm.giving_way import LOAD_SHARE

STORING, LOADING = "store:turns:1", f"load:share:{LOAD_SHARE * 100:.0f}"  # as the engine does while it generates
AT_ONCE = "load:dma:528"  # as fast as it goes
DISTURBED = (STORING, LOADING, f"{STORING}+{LOADING}", AT_ONCE)
#: what may make the device slow, one part of a store or load each
PARTS = ("load:torch:0", "store:copies:0", "load:copies:0", "store:kernel:0", "load:kernel:0", STORING, AT_ONCE)
#: the slowest hundredth of them is six steps: of 200 it was two, which say nothing
STEPS = 600


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


def beside_idle(ours: Engine, found: dict, how: str, seed: int, out: int) -> None:
    """Time between tokens of 8 streams, idle and then disturbed: the machine is not the same for a minute."""
    found.setdefault(f"idle, {how}", []).append(ours.do("itl", streams=8, out=out, seed=seed + 500))
    found.setdefault(how, []).append(ours.do("itl", streams=8, out=out, seed=seed, disturb=how))
    write()


def of_idle(found: dict, how: str, q: str) -> list[float]:
    """Each disturbed figure by the idle one before it."""
    return [a[q] / b[q] for a, b in zip(found[how], found[f"idle, {how}"], strict=True)]


def between_tokens(run: Run) -> None:
    ours = run.ours()  # alone: where others are asked in between, the device goes from one of its two states to the other
    found: dict = results.setdefault("itl", {})
    ours.do("one_context")
    ours.do("itl", streams=8, out=60, seed=950, disturb=STORING)  # and is in the slower one from here on
    for again in range(max(1, run.rounds - 2)):
        for n, how in enumerate(DISTURBED):
            beside_idle(ours, found, how, 20 + 10 * n + again, STEPS)
    for how in DISTURBED:
        ratios = {q: statistics.median(of_idle(found, how, q)) for q in ("p50", "p99")}
        m = sorted(found[how], key=lambda x: x["p99"])[(len(found[how]) - 1) // 2]
        row(
            f"ITL of 8 streams, p50 / p99, {how}",
            f"{m['p50']:.2f} / {m['p99']:.2f} ms = {ratios['p50']:.3f} / {ratios['p99']:.3f} of idle "
            f"(store {m['stored_gb_s']:.1f}, load {m['loaded_gb_s']:.1f} GB/s)",
        )
    idle = [x for how in DISTURBED for x in found[f"idle, {how}"]]
    p50, p99 = (statistics.median(x[q] for x in idle) for q in ("p50", "p99"))
    row("ITL of 8 streams, p50 / p99, idle", f"{p50:.2f} / {p99:.2f} ms")


def two_speeds(run: Run) -> None:
    """What makes a device slow that was touched: time between tokens after a touch, beside one part of stores and loads, after it."""
    ours = run.ours()
    ours.do("one_context")
    found: dict = results.setdefault("two_speeds", {})
    for again in range(3):
        for n, how in enumerate(("", *PARTS)):
            ours.do("touch")
            seed = 1000 * again + 10 * n
            runs = [ours.do("itl", streams=8, out=60, seed=seed + i, disturb=how if i == 1 else "") for i in range(3)]
            found.setdefault(how or "nothing", []).append([x["p50"] for x in runs])
            write()
    for how, each in found.items():
        said = [f"{statistics.median(x[i] for x in each):.2f}" for i in range(3)]
        row(f"ITL of 8 streams, touched, beside, after: {how}", f"{' / '.join(said)} ms")


def timeline(run: Run) -> None:
    """Where each millisecond of a first token goes: loaded from DRAM, and from plain vLLM's own cache; medians of 5."""
    ours, plain = run.pair()
    for n in (20000, 2000):
        found: dict[str, list[dict]] = {"DRAM": [], "plain, GPU cache": []}
        for seed in range(300000 + n, 300006 + n):
            ours.do("generate", seeds=[seed], n=n, out=1)
            plain.do("generate", seeds=[seed], n=n, out=1)
            ours.do("settle")
            ours.do("reset")
            for name, engine in (("DRAM", ours), ("plain, GPU cache", plain)):
                got = engine.do("timeline", seed=seed, n=n)
                if got["cached"] < n // 2 // Engine.shrink:
                    raise RuntimeError(f"{name}: only {got['cached']} of {n} tokens were cached")
                found[name].append(got["phases"])
        results[f"timeline {n}"] = found
        for name, each in found.items():
            each = each[1:]  # the first is a warm-up
            median = {p: statistics.median(x.get(p, 0.0) for x in each) for p in each[0]}
            row(f"first token of {n} tokens, {name}, ms", ", ".join(f"{p} {ms:.1f}" for p, ms in median.items()))

"""Steps of run_all.py that take apart what stores cost a prefill, and loads an answer: arms in one engine, in strict turns."""

from __future__ import annotations

import statistics

from gpu_session import Engine, Run, results, row, write
from steps_waiting import AT_ONCE, STEPS, STORING, beside_idle, of_idle

#: the first is what the others are compared with
ARMS = ("idle", "full", "dma:132", "copies:0", "gathers:528", "nothing", "pieces:0", "pieces:2")
ON_CPU = ("idle", "full", "nothing")
GRIDS = (32, 132, 264, 528, 1056)
LOADS = (AT_ONCE, "load:copies:0", *(f"load:share:{share}" for share in (75, 60, 50, 40)))
LOADS += tuple(f"{STORING}+load:share:{share}" for share in (60, 50))
SHARES = (1.0, 0.75, 0.6, 0.5)


def stores(run: Run) -> None:
    """24 x 4000 + 64 with nothing to reuse: each arm once a round, always in the same order; ratios are to the round's idle one."""
    ours = run.ours()
    on_device = ours.do("about")["on_device"]
    if on_device:
        alone = results["kernels alone, ms a chunk"] = ours.do("kernels_alone", grids=GRIDS)
        row("one chunk's kernel alone, waited for, ms", ", ".join(f"{k} {v:.3f}" for k, v in alone.items()))
    arms = ARMS if on_device else ON_CPU
    found: dict[str, list[dict]] = results.setdefault("stores", {arm: [] for arm in arms})
    for again in range(run.rounds + 1):
        for n, arm in enumerate(arms):
            ours.do("store_arm", arm=arm)
            first = 200000 + 1000 * again + 100 * n
            got = ours.do("generate", seeds=list(range(first, first + 24)), n=4000, out=64)
            ours.do("settle")  # what is still being stored must not slow the next one down
            if again:  # the first is a warm-up
                stored = sum(tokens for tokens, _ in ours.do("rates")["stores"])
                found[arm].append({"tok_s": got["tok_s"], "cpu_ms": got["cpu_ms"], "ms": got["ms"], "stored": stored})
            else:
                ours.do("rates")
            write()
    ours.do("store_arm", arm="full")
    idle = found[arms[0]]
    for arm in arms:
        each = [a["tok_s"] / b["tok_s"] for a, b in zip(found[arm], idle, strict=True)]
        ms, cpu, stored = (statistics.median(x[k] for x in found[arm]) for k in ("ms", "cpu_ms", "stored"))
        row(
            f"24 x 4000 + 64, stores: {arm}",
            f"{statistics.median(each):.4f} of idle ({min(each):.3f} to {max(each):.3f}, mean {statistics.mean(each):.4f}); "
            f"{ms:.0f} ms, {cpu:.0f} of a processor, {stored:.0f} tokens stored; {len(each)} rounds",
        )


def loads(run: Run) -> None:
    """Time between tokens of 8 streams while 20k tokens are loaded without a pause, each way after an idle run."""
    ours = run.ours()
    found: dict[str, list[dict]] = results.setdefault("loads", {})
    ours.do("one_context")  # the device would go from one of its two states to the other now and then
    for again in range(max(1, run.rounds - 1)):
        for n, how in enumerate(LOADS):
            beside_idle(ours, found, how, 20 + 10 * n + again, STEPS)
    for how in LOADS:
        said = []
        for q in ("p50", "p99"):
            each = of_idle(found, how, q)
            said.append(f"{q} {statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})")
        speed = statistics.median(x["loaded_gb_s"] for x in found[how])
        row(f"ITL of 8 streams, of idle, {how}", f"{', '.join(said)}; {speed:.1f} GB/s")


def hits(run: Run) -> None:
    """What the first token of a 20k prompt that is loaded waits for beside 8 streams, by the share of the bus that its load may take."""
    ours = run.ours()
    seeds = list(range(400000, 400009))  # more than the engine's own cache holds: each comes back from DRAM
    for seed in seeds:
        ours.do("generate", seeds=[seed], n=20000, out=1)
    ours.do("settle")
    found: dict[str, list[dict]] = results.setdefault("hits", {})
    for again in range(max(1, run.rounds - 1)):
        for n, share in enumerate(SHARES):
            found.setdefault(str(share), []).append(ours.do("hits", streams=8, seeds=seeds, n=20000, share=share, seed=10 * again + n))
            write()
    for share, each in found.items():
        kept = each[1:] or each  # the first is a warm-up
        first = [ms for x in kept for ms in x["first"]]
        load = [ms for x in kept for tokens, ms in x["loads"] if tokens > 19000 // Engine.shrink]
        p50, mean = (statistics.median(x[k] for x in kept) for k in ("p50", "mean"))
        row(
            f"20k from DRAM beside 8 streams, load share {share}",
            f"first token {statistics.median(first):.1f} ms, {len(load)} of {len(first)} loaded in "
            f"{statistics.median(load or [0.0]):.1f} ms; streams' steps p50 {p50:.2f}, mean {mean:.2f} ms",
        )

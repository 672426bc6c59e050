"""Steps of run_all.py about what an engine answers: tokens, rounded payloads, the others' connectors."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

from gpu_session import HERE, Run, results, row

TEXTS = [
    "The history of the city begins with a small harbour on the river. " * n + "In one sentence, the city is"
    for n in (20, 45, 61, 88)
]


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


def pressure(run: Run) -> None:
    """check_pressure.py: preemptions, aborts and resets, and every answer as plain vLLM gives it."""
    if run.small is None:
        return
    words = [sys.executable, "-P", str(HERE / "check_pressure.py"), "--model", run.small, "--out", str(run.out / "pressure.json")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=run.left, check=False)
    (run.out / "pressure.log").write_text(done.stdout + done.stderr)
    if not (run.out / "pressure.json").exists():
        raise RuntimeError(f"exit {done.returncode}; see pressure.log")
    found = results["pressure"] = json.loads((run.out / "pressure.json").read_text())
    if done.returncode:
        raise RuntimeError(f"{'; '.join(found['wrong'])} ({found['what']}); see pressure.json")
    row("preemptions, aborts, resets: answers as plain vLLM's", f"{found['equal']} of {found['answers']} ({found['what']})")


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

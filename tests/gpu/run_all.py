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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from gpu_session import HERE, Engine, Run, daemon, keep_in, results, row, table, write
from steps_answers import payload, peers, pressure, tokens_agree
from steps_cost import overhead, throughput
from steps_kernels import copies, kernel_tests, sanitizer
from steps_stores import hits, loads, stores
from steps_waiting import between_tokens, first_token, timeline, two_speeds


@dataclass(frozen=True)
class Step:
    name: str
    work: Callable[[Run], None]
    seconds: float  # what it takes at most; it is left out where less is left
    shows: str
    pair: bool = False  # whether it needs the pair of engines, or leaves them be


#: in order of value: what comes first has the time
STEPS = (
    Step("copies", copies, 75, "store and load beside the bus, and with 8 bits a value; builds the kernels", pair=True),
    Step(
        "ttft", first_token, 170,
        "first token from DRAM at 2k, 10k, 20k, 30k tokens, beside plain vLLM; KV byte by byte; with the start", pair=True,
    ),
    Step("throughput", throughput, 110, "nothing to reuse and all in the GPU's cache, in turn with plain vLLM", pair=True),
    Step("itl", between_tokens, 130, "time between tokens of 8 streams while 20k tokens are stored or loaded", pair=True),
    Step("hits", hits, 120, "first token of 20k tokens from DRAM beside 8 streams, by the load's share of the bus", pair=True),
    Step("timeline", timeline, 90, "where each ms of a first token goes, from DRAM and from plain vLLM's own cache", pair=True),
    Step("overhead", overhead, 200, "plain, a connector that does nothing, ours idle, ours; the time in each method", pair=True),
    Step("stores", stores, 300, "nothing to reuse, with parts of a store left out or changed, in one engine", pair=True),
    Step("loads", loads, 330, "time between tokens beside other ways to load, in one engine", pair=True),
    Step("speeds", two_speeds, 75, "which part of a store or load makes the device slow again", pair=True),
    Step("tokens", tokens_agree, 90, "greedy tokens of the real model: loaded = computed = plain"),
    Step("pressure", pressure, 120, "the same with preemptions, aborts and resets in between"),
    Step("tests", kernel_tests, 60, "kernels against plain indexing, bit for bit"),
    Step("sanitizer", sanitizer, 90, "memcheck and racecheck of the kernels"),
    Step("payload", payload, 110, "an engine that stores int8"),
    Step("peers", peers, 220, "OffloadingConnector and LMCache at 20k tokens"),
)  # fmt: skip


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
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--small")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--cache", default="24GiB")
    parser.add_argument("--only", default="", help=f"comma-separated, of {','.join(s.name for s in STEPS)}")
    parser.add_argument("--skip", default="", help="the same")
    parser.add_argument("--budget", type=float, default=520, help="seconds for everything (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of throughput; overhead has one more, itl two fewer (default %(default)s)")
    parser.add_argument(
        "--lane", type=int, default=0, help="of several runs side by side on one host, which one: sets ports and names"
    )
    parser.add_argument(
        "--engine", type=json.loads, default={}, help="JSON: more arguments for vLLM, in all engines but the small model's"
    )
    parser.add_argument("--shrink", type=int, default=1, help="prompts so many times shorter: to try the steps without a GPU")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    steps = chosen(args.only, args.skip)
    if args.dry_run:
        return dry_run(steps, args)
    args.out.mkdir(parents=True, exist_ok=True)
    keep_in(args.out / "results.json")
    begun = time.monotonic()
    cache, socket = daemon(f"gpu{args.lane}", args.cache, 8080 + args.lane, args.out)
    Engine.ports += 800 * args.lane
    Engine.shrink = args.shrink
    null = any(step.name == "overhead" for step in steps)
    run = Run(args.out, args.model, args.small, socket, begun + args.budget, args.rounds, args.engine, null)
    try:
        for step in steps:
            if run.left < step.seconds:
                row(step.name, f"left out: {run.left:.0f} s are left, it takes up to {step.seconds:.0f}")
                continue
            if not step.pair:
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

"""The benchmark's arms on one GPU: run_bench.py --model DIR --out OUT [--only STEP ...] [--dry-run]

--model: a folder with config.json of the model to measure, loaded with dummy weights. Each step is one `pdserve bench` of ten
minutes at most; results, raw records and report.html lie in OUT. --dry-run starts nothing, also on a machine without a GPU: it
makes every arm's processes and every plan, checks that they fit, and prints what would run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

TOPOLOGY = """
name: bench-gpu
model: {model}
engine:
  device: cuda
  dtype: bfloat16
  max_model_len: 32768
  max_num_seqs: 64
  gpu_memory_utilization: {memory}
  extra_args: ["--load-format", "dummy"]
both: [{{port: 8300, gpus: [0]}}]
cache: {{size: 48GiB}}
proxy: {{port: 8000}}
"""
ROOMY, TIGHT = 0.85, 0.25  # of the GPU's memory; the second leaves an 8B model about 100k tokens of its own KV


@dataclass(frozen=True)
class Step:
    """One benchmark. `arms` that are not installed are left out by pdserve itself, with a sentence."""

    name: str
    words: str
    arms: str
    memory: float = ROOMY
    repetitions: int = 3
    minutes: int = 10


LONG = "long-doc-qa --num-documents 8 --document-length 20000 --output-len 100"
USERS = "multi-round-qa --num-users 20 --qps 2 --user-history-prompt 20000 --time 60 --slo-ttft 1"
AGENTS = (
    "trace-replay --trace-directory {traces} --max-context 30000 --time-scale 0.1 --max-delay 5 --max-output 200 "
    "--duration 90 --start-users 2 --max-users 24 --slo-ttft 1 --assessment-period 10"
)
#: two arms a step, so that three turns of each (fewer give no verdict worth having) fit ten minutes
STEPS = (
    Step("long-doc-qa", LONG, "gpu-cache,cache", TIGHT),
    Step("long-doc-qa-offloading", LONG, "offloading,cache", TIGHT),
    Step("long-doc-qa-lmcache", LONG, "lmcache,cache", TIGHT),
    Step("all-hit", "all-hit --num-requests 60 --output-len 64", "gpu-cache,cache"),
    Step("random", "random --num-prompts 40 --random-input-len 8000 --random-output-len 128", "gpu-cache,cache"),
    Step("multi-round-qa", USERS, "gpu-cache,cache", TIGHT),
    Step("multi-round-qa-lmcache", USERS, "lmcache,cache", TIGHT),
    Step("trace-replay", AGENTS, "gpu-cache,cache", TIGHT, repetitions=2),
    Step("trace-replay-lmcache", AGENTS, "lmcache,cache", TIGHT, repetitions=2),
    Step("cache-rate", "cache-rate --num-requests 12 --prompt-len 20000 --num-prefixes 8", "gpu-cache,cache", TIGHT),
)
REGIMES = (
    "regimes --working-sets 60000,400000 --lengths 2000,20000 --reuse 0,90 --users 1,8 --requests 8 --repetitions 2"
)


def command(step: Step, folder: Path, out: Path, traces: Path) -> list[str]:
    words = step.words.format(traces=traces).split()
    common = [
        "--arms",
        step.arms,
        "--topology",
        str(folder / f"{step.memory}.yaml"),
        "--repetitions",
        str(step.repetitions),
    ]
    return [sys.executable, "-P", "-m", "pdserve", "bench", *words, *common, "--out", str(out), "--name", step.name]


def write_topologies(model: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for memory in (ROOMY, TIGHT):
        (folder / f"{memory}.yaml").write_text(TOPOLOGY.format(model=model.resolve(), memory=memory))


def check(step: Step, folder: Path, traces: Path) -> None:
    """Everything that can be wrong without a GPU: the arms' topologies, their processes, the plan's lengths."""
    from pdserve import topology
    from pdserve.bench import runner, variants, workloads
    from pdserve.deploy import plan

    raw = yaml.safe_load((folder / f"{step.memory}.yaml").read_text())
    ports = itertools.count(9000)
    for arm in variants.parse(step.arms):
        top = topology.parse(yaml.safe_dump(variants.make(arm, raw, lambda: next(ports), 9999)))
        names = [process.name for process in plan.make(top, cores=list(range(16))).processes]
        print(f"   {arm}: {', '.join(names)}")
    name, *words = step.words.format(traces=traces).split()
    cut = words.index("--duration") if "--duration" in words else len(words)
    own = (
        [w for w in words[:cut] if w != "--slo-ttft"]
        if name != "multi-round-qa"
        else words[: words.index("--slo-ttft")]
    )
    made = workloads.plan_of(name, own)
    runner.check_length(made, raw["engine"]["max_model_len"])
    print(f"   {len(made.stages)} stages, longest {made.longest()} tokens")


def run(step: Step, folder: Path, out: Path, traces: Path) -> dict[str, object]:
    words, began = command(step, folder, out, traces), time.monotonic()
    print(f"## {step.name}: {shlex.join(words[4:])}", flush=True)
    env = {**os.environ, "PYTHONSAFEPATH": "1", "PDSERVE_RUN_DIR": str(out / "run")}
    process = subprocess.Popen(words, env=env)
    try:
        code: int | None = process.wait(step.minutes * 60)
    except subprocess.TimeoutExpired:
        process.send_signal(2)  # it stops its deployment
        code = None
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
    return {"step": step.name, "exit": code, "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder with config.json and tokenizer files")
    parser.add_argument(
        "--traces", type=Path, default=Path("shared/traces"), help="kv-cache-tester's traces (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="where results go")
    parser.add_argument("--only", nargs="+", choices=[*(s.name for s in STEPS), "regimes"], help="these steps only")
    parser.add_argument("--dry-run", action="store_true", help="check and print, start nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    folder = args.out / "topologies"
    write_topologies(args.model, folder)
    done = []
    for step in STEPS:
        if args.only and step.name not in args.only:
            continue
        if args.dry_run:
            print(
                f"## {step.name}, at most {step.minutes} minutes: {shlex.join(command(step, folder, args.out, args.traces)[4:])}"
            )
            check(step, folder, args.traces)
        else:
            done.append(run(step, folder, args.out, args.traces))
    if not args.only or "regimes" in args.only:
        words = [*REGIMES.split(), "--topology", str(folder / f"{TIGHT}.yaml"), "--out", str(args.out / "regimes")]
        if args.dry_run:
            print(f"## regimes: bench {shlex.join(words)}")
        else:
            code = subprocess.run([sys.executable, "-P", "-m", "pdserve", "bench", *words], check=False).returncode
            done.append({"step": "regimes", "exit": code})
    (args.out / "steps.json").write_text(json.dumps(done, indent=1))
    return 0 if all(d["exit"] == 0 for d in done) else 1


if __name__ == "__main__":
    raise SystemExit(main())

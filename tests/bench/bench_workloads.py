"""The recorded benchmark runs on the CPU, each with its own command; for a machine that does nothing else.

    python tests/bench/bench_workloads.py --out docs/measurements/DATE-bench [--only STEP ...] [--dry-run]

Two cores, the demo model in bf16. The engines' own cache is made small (12k tokens), so that a few documents are memory pressure.
LMCache takes part where it is installed (`make bench-quick ARGS=--with-lmcache` installs it beside the environment). Raw records,
CSV and report.html lie in DIR; steps.json says how each step ended. Times are for a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ENGINE = """
engine:
  device: cpu
  dtype: bfloat16
  max_model_len: 4096
  max_num_seqs: 8
  kv_cache_space_gib: 1
  extra_args: ["--num-gpu-blocks-override", "96"]
  env: {VLLM_SERVER_DEV_MODE: "1"}
"""
TOPOLOGIES = {
    "one": f"name: bench-one\nmodel: demo\n{ENGINE}\nboth: [{{port: 8300, cpus: '0'}}]\n"
    "cache: {size: 2GiB, admin_port: 8090}\nproxy: {port: 8010}\n",
    "two": f"name: bench-two\nmodel: demo\n{ENGINE}\nprefill: [{{port: 8110, cpus: '0'}}]\ndecode: [{{port: 8210, cpus: '1'}}]\n"
    "cache: {size: 2GiB, admin_port: 8090}\nproxy: {port: 8010}\n",
}
LONG = "--num-documents 8 --document-length 2500 --output-len 16 --repeat-count 2 --max-inflight-requests 1"


@dataclass(frozen=True)
class Step:
    """`words` are those after `pdserve`; `{one}` and `{two}` stand for topologies, `{out}` for the folder of results."""

    name: str
    minutes: int
    words: str
    after: tuple[str, ...] = ()


STEPS = (
    Step("long-doc-qa", 15, f"bench long-doc-qa {LONG} --arms gpu-cache,cache,lmcache --topology {{one}} --repetitions 3 --out {{out}}"),
    Step("random", 8, "bench random --num-prompts 12 --random-input-len 1500 --random-output-len 32 --max-concurrency 2 "
         "--arms gpu-cache,cache,lmcache --topology {one} --repetitions 3 --out {out}"),
    Step("all-hit", 8, "bench all-hit --num-prompts 2 --num-requests 24 --prompt-len 2500 --output-len 32 --max-inflight-requests 2 "
         "--arms gpu-cache,cache,lmcache --topology {one} --repetitions 3 --out {out}"),
    Step("multi-round-qa", 16, "bench multi-round-qa --num-users 6 --num-rounds 4 --qps 0.4 --shared-system-prompt 200 "
         "--user-history-prompt 1500 --answer-len 16 --time 40 --slo-ttft 2 --arms gpu-cache,cache,lmcache --topology {one} "
         "--repetitions 3 --out {out}"),
    Step("trace-replay", 16, "bench trace-replay --trace-directory {traces} --scale 0.02 --time-scale 0.05 --max-delay 2 --max-output 16 "
         "--duration 90 --warmup 10 --users 4 --slo-ttft 3 --arms gpu-cache,cache,lmcache --topology {one} --repetitions 3 --out {out}"),
    Step("trace-ramp", 10, "bench trace-replay --trace-directory {traces} --scale 0.02 --time-scale 0.05 --max-delay 2 --max-output 16 "
         "--duration 120 --start-users 1 --max-users 12 --slo-ttft 3 --assessment-period 12 --arms gpu-cache,cache --topology {one} "
         "--repetitions 2 --out {out} --name trace-ramp"),
    Step("pd-interference", 10, "bench pd-interference --streams 3 --stream-prompt-len 60 --stream-output-len 200 --prefill-len 2500 "
         "--num-prefills 3 --prefill-rate 0.2 --arms gpu-cache,pd --topology {two} --repetitions 3 --out {out}"),
    Step("working-set", 15, "bench working-set --working-sets 5000,10000,20000,30000 --document-length 2500 --num-requests 6 "
         "--output-len 8 --arms gpu-cache,cache --topology {one} --repetitions 3 --out {out}"),
    Step("cache-rate", 13, "bench cache-rate --num-requests 5 --prompt-len 2500 --num-prefixes 6 --output-len 8 --arms gpu-cache,cache "
         "--topology {one} --repetitions 3 --out {out}"),
    Step("regimes", 18, "bench regimes --topology {one} --arms gpu-cache,cache-always,cache --working-sets 5000,20000 --lengths 300,2500 "
         "--reuse 0,90 --users 1 --requests 5 --repetitions 3 --out {out}"),
    Step("size", 8, "launch {one} --detach", (
        "size --measure bench-one --model demo --save {out}/speeds.json",
        "stop bench-one",
        f"bench long-doc-qa {LONG} --arms cache --topology {{one}} --repetitions 2 --out {{out}} --name size-run",
        "size --model demo --speeds {out}/speeds.json --workload long-doc-qa --workload-args {long} --users 1 --sizes 2 "
        "--check {out}/size-run.json --arm cache --json",
    )),
)  # fmt: skip


def commands(step: Step, out: Path, traces: Path) -> list[list[str]]:
    facts = {name: str(out / "topologies" / f"{name}.yaml") for name in TOPOLOGIES}
    facts |= {"out": str(out), "traces": str(traces), "long": shlex.quote(json.dumps(LONG.split()))}
    return [shlex.split(words.format(**facts)) for words in (step.words, *step.after)]


def run(step: Step, out: Path, traces: Path) -> dict[str, object]:
    began, codes = time.monotonic(), []
    for words in commands(step, out, traces):
        print(f"## {step.name}: pdserve {shlex.join(words)}", flush=True)
        save = (out / "size-check.json").open("w") if "--check" in words else None
        try:
            env = {**os.environ, "PYTHONSAFEPATH": "1"}
            codes.append(
                subprocess.run(
                    [sys.executable, "-P", "-m", "pdserve", *words], env=env, stdout=save, check=False
                ).returncode
            )
        finally:
            if save is not None:
                save.close()
    return {"step": step.name, "exit": codes, "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where results go")
    parser.add_argument(
        "--traces", type=Path, default=Path("../shared/traces"), help="kv-cache-tester's (default %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=[s.name for s in STEPS], help="these steps only")
    parser.add_argument("--dry-run", action="store_true", help="print commands and minutes, start nothing")
    args = parser.parse_args()
    (args.out / "topologies").mkdir(parents=True, exist_ok=True)
    for name, text in TOPOLOGIES.items():
        (args.out / "topologies" / f"{name}.yaml").write_text(text)
    chosen = [s for s in STEPS if not args.only or s.name in args.only]
    if args.dry_run:
        for step in chosen:
            for words in commands(step, args.out, args.traces):
                print(f"{step.name} ({step.minutes} min): pdserve {shlex.join(words)}")
        print(f"about {sum(s.minutes for s in chosen)} minutes in all")
        return 0
    done = []
    for step in chosen:
        done.append(run(step, args.out, args.traces))
        (args.out / "steps.json").write_text(json.dumps(done, indent=1))
    return 0 if all(not any(d["exit"]) for d in done) else 1  # type: ignore[arg-type]


if __name__ == "__main__":
    raise SystemExit(main())

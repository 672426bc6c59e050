"""The benchmark's arms on one GPU: run_bench.py STEP --model DIR --out OUT [--gpu N] [--budget SECONDS] [--dry-run]

Several of these run side by side, one GPU each: ports, names, sockets and memory are kept apart by the GPU's number. All arms of a
step are up at the same time on its GPU, each with a KV cache of its own of the same size, and are asked in turns; every workload of
the step goes round once before the first goes round again. What does not fit --budget (starting and stopping included) is left
out; raw records are written after every round. --model: a folder with config.json and tokenizer; weights are dummies.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from pdserve import topology
from pdserve.bench import arms, one, suite, variants
from pdserve.bench.regimes import sweep
from pdserve.bench.runner import Server
from pdserve.bench.suite import Load
from pdserve.deploy import plan

GRAPHS = '{"mode":0,"cudagraph_mode":"FULL_DECODE_ONLY","cudagraph_capture_sizes":[1,2,4,8,16,32,64]}'
TOPOLOGY = """
name: bench-g{gpu}
model: {model}
engine:
  device: cuda
  dtype: bfloat16
  max_model_len: 32768
  max_num_seqs: 64
  max_num_batched_tokens: 8192
  gpu_memory_utilization: 0.1
  start_timeout: 180
  env: {{VLLM_USE_FLASHINFER_SAMPLER: "0", HF_HUB_OFFLINE: "1", OMP_NUM_THREADS: "4"}}
  extra_args: ["--load-format", "dummy", "--kv-cache-memory-bytes", "{kv_bytes}", "--compilation-config", '{graphs}']
both: [{{port: 1, gpus: [{gpu}]}}]
cache: {{size: {cache_gib}GiB}}
proxy: {{port: 2}}
"""
TOKEN_BYTES = 2 * 36 * 8 * 128 * 2  # K and V, layers, KV heads, head size, bf16: Qwen3-8B
FIRST_PORT, PORTS = 21000, 100  # of GPU 0; so many for each GPU
SERVER = Server("", "", 32768, 1.0)  # what the engines will say of themselves
STOP_SECONDS = 20.0  # kept back for stopping everything (two engines took 3, three 13)
IDS = """--extra-body {"return_token_ids":true}"""  # dummy weights answer with tokens that are no text: what came is told by ids
WORKLOADS = "--endpoint completions --max-client-overhead 0"  # every arm is sent the same conversation
SETTLE = ("0.5", "0.3")  # of a workload, of a point


@dataclass(frozen=True)
class Step:
    """`kv_gib`: each engine's own KV cache; 8 GiB are 58k tokens of an 8B model."""

    arms: str
    loads: tuple[Load, ...]
    kv_gib: int = 8
    cache_gib: int = 36
    about: str = field(default="", compare=False)

    @property
    def sizes(self) -> str:
        own = f"Every arm has a KV cache of its own of {self.kv_gib} GiB on the GPU ({(self.kv_gib << 30) // TOKEN_BYTES // 1000}k tokens)"
        return f"{own}; each that keeps KV on the host has {self.cache_gib} GiB there ({(self.cache_gib << 30) // TOKEN_BYTES // 1000}k)."


TURNS_20K = (
    "multi-round-qa --num-users 10 --num-rounds 10 --qps 1 --user-history-prompt 20000 --synthetic-answers --time 60"
)
AGENTS = (
    "trace-replay --trace-directory {traces} --scale 0.3 --max-context 16000 --time-scale 0.3 --max-delay 10 --max-output 100 --slo-ttft 1"
)
# short turns, so that there are many: each one more makes the interval narrower
RANDOM = "random --num-prompts {} --random-input-len 8000 --random-output-len 128"
ALL_HIT = "all-hit --num-requests 40 --output-len 64"
AGENTS_32 = Load("agents", f"{AGENTS} --users 32 --duration 30 --warmup 10", 36)
CONVERSATIONS = Load("turns", f"{TURNS_20K} --duration 26 --warmup 8 --slo-ttft 1", 31)
STEPS = {
    "agents": Step("gpu-cache,cache,lmcache", (
        AGENTS_32,
        Load("agents-8", f"{AGENTS} --users 8 --duration 20 --warmup 5", 22, rounds=1, since=3, arms=("gpu-cache", "cache")),
    ), kv_gib=16, cache_gib=56, about="recorded agents' conversations: 32 users' KV is three times what the GPU holds; 8 users' fits"),
    "turns": Step("gpu-cache,cache", (
        CONVERSATIONS,
        Load("random", RANDOM.format(24), 9, rounds=12),
        Load("all-hit", ALL_HIT, 9, rounds=12),
        Load("agents-8", f"{AGENTS} --users 8 --duration 16 --warmup 4", 18),
    ), kv_gib=16, cache_gib=48, about="ten users in conversation about 20k tokens each, the GPU holds five; nothing to gain; low load"),
    "turns-peers": Step(
        "gpu-cache,cache,lmcache,offloading", (CONVERSATIONS,), kv_gib=12, cache_gib=32,
        about="the ten conversations against all that keep KV on the host",
    ),
    "agents-peers": Step(
        "gpu-cache,cache,lmcache,offloading", (AGENTS_32,), kv_gib=12, cache_gib=32,
        about="the 32 agents against all that keep KV on the host",
    ),
    "documents": Step("gpu-cache,cache,lmcache,offloading", (
        Load("documents", "long-doc-qa --num-documents 8 --document-length 20000 --output-len 100", 16),
        Load("regimes-peers", "regimes --working-sets 36000,150000 --lengths 12000 --reuse 0,90 --users 1 --requests 4", 11),
        Load("random-peers", RANDOM.format(16), 7, rounds=6),
    ), cache_gib=28, about="8 documents of 20k, asked again at random, against all that keep KV on the host; what each is worth "
        "at a point; and nothing to reuse"),
    "no-loss": Step("gpu-cache,cache", (
        Load("random", RANDOM.format(16), 7, rounds=16),
        Load("all-hit", "all-hit --num-requests 24 --output-len 64", 6, rounds=16),
    ), kv_gib=36, about="where a cache below the GPU's can only be in the way: nothing reused, and everything in the GPU's own cache; "
        "with --arm-gpus 0,1 and then 1,0: alone on its GPU an engine steps slower than where others have used it"),
    "rates": Step("gpu-cache,cache", (
        Load("rates", "cache-rate --rates 100,75,50,25,0 --num-requests 12 --prompt-len 20000 --num-prefixes 8", 45, rounds=4),
    ), about="100 to 0 % of each 20k prompt sent before, in that order: what is asked for once would push the rest out of 36 GiB"),
    "regimes": Step("gpu-cache,cache-always,cache", (
        Load("regimes", "regimes --working-sets 36000,150000 --lengths 1000,12000 --reuse 0,90 --users 1,4 --requests 6", 45, rounds=4),
    ), about="the adaptive arm against the best fixed one at every point"),
}  # fmt: skip


class Lane:
    """One GPU's part of the machine, and what is left of its time."""

    def __init__(self, args: argparse.Namespace, step: Step) -> None:
        self.step, self.out, self.first_port = step, args.out, FIRST_PORT + PORTS * args.gpu
        self.until = time.monotonic() + args.budget
        self.traces, self.arm_gpus = args.traces, args.arm_gpus
        text = TOPOLOGY.format(
            gpu=args.gpu,
            model=args.model.resolve(),
            graphs=GRAPHS,
            kv_bytes=step.kv_gib << 30,
            cache_gib=step.cache_gib,
        )
        self.topology = args.out / "topology.yaml"
        self.topology.write_text(text)
        self.base = yaml.safe_load(text)

    def words(self, load: Load) -> list[str]:
        name, *words = load.words.format(traces=self.traces).split()
        given = [*IDS.split(), "--arms", self.step.arms, "--topology", str(self.topology), "--first-port", str(self.first_port)]
        given += ["--settle", SETTLE[name == "regimes"], "--timeout", "60", "--out", str(self.out), "--name", load.name, "--quiet"]
        given += ["--arm-gpus", self.arm_gpus] if self.arm_gpus else []
        return [name, *words, *given, *([] if name == "regimes" else WORKLOADS.split())]

    def left(self) -> float:
        return self.until - time.monotonic()


def check(lane: Lane) -> None:
    """Everything that can be wrong without a GPU: the arms' topologies, their processes, the plans' lengths."""
    ports = itertools.count(lane.first_port)
    words = suite.parsed(lane.words(lane.step.loads[0]))
    for arm in variants.parse(lane.step.arms):
        base = arms.placed(arm, lane.base, words)
        top = topology.parse(yaml.safe_dump(variants.make(arm, base, lambda: next(ports), 9999)))
        for process in plan.make(top, cores=list(range(16))).processes:
            print(f"   {arm}: {process.shell()}")
    for load in lane.step.loads:
        args = suite.parsed(lane.words(load))
        plans = [one.make_plan(args, SERVER)] if args.word != "regimes" else sweep.plans(args, SERVER)
        longest = max(made.longest() for made in plans)
        print(f"   {load.name}: plans {len(plans)}, longest {longest} tokens, {load.rounds} rounds of {load.seconds} s an arm")
    print(f"   {lane.step.sizes}")
    print(
        f"   at most {sum(load.seconds * load.rounds for load in lane.step.loads) * len(lane.step.arms.split(',')):.0f} s of turns"
    )


def measure(lane: Lane) -> str:
    todo = {load.name: suite.parsed(lane.words(load)) for load in lane.step.loads}
    return suite.run(lane.step.loads, todo, lane.left(), STOP_SECONDS, say, about=[lane.step.sizes])


def say(text: str) -> None:
    print(text, flush=True)


VLLM = """#!{python}
import sys
from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
"""


def vllm_command() -> None:
    """pdserve starts `vllm` beside its interpreter; where vLLM lies on PYTHONPATH instead, that command is made."""
    place = Path(sys.executable).parent / "vllm"
    if not place.exists():
        made = place.with_name(f"vllm.{os.getpid()}")  # several steps may begin at the same moment
        made.write_text(VLLM.format(python=sys.executable))
        made.chmod(0o755)
        made.replace(place)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "step",
        choices=STEPS,
        help="; ".join(f"{name}: {step.about}" for name, step in STEPS.items()).replace("%", "%%"),
    )
    parser.add_argument("--model", type=Path, required=True, help="a folder with config.json and tokenizer files")
    parser.add_argument(
        "--traces", type=Path, default=Path("traces"), help="kv-cache-tester's traces (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="where results go")
    parser.add_argument("--gpu", type=int, default=0, help="which GPU; ports and names follow (default %(default)s)")
    parser.add_argument(
        "--budget", type=float, default=540, help="seconds, starting and stopping included (default %(default)s)"
    )
    parser.add_argument("--arms", default="", help="instead of the step's own: two arms leave time for more rounds")
    parser.add_argument("--arm-gpus", default="", help="each arm's own GPU, like 0,1 (default: all on --gpu)")
    parser.add_argument("--dry-run", action="store_true", help="check and print, start nothing")
    args = parser.parse_args()
    step = STEPS[args.step]
    step = replace(step, arms=args.arms or step.arms)
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"PDSERVE_RUN_DIR": f"/tmp/pdserve-g{args.gpu}", "PYTHONSAFEPATH": "1", "VLLM_NO_USAGE_STATS": "1"}
    lane = Lane(args, step)
    if args.dry_run:
        say(f"## {args.step} on GPU {args.gpu}, {args.budget:.0f} s: {lane.step.about}")
        check(lane)
        return 0
    vllm_command()
    began = time.monotonic()
    ended = measure(lane)
    say(f"{args.step}: {ended}, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

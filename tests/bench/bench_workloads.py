"""The recorded benchmark runs on the CPU: every workload in arms, on a machine that does nothing else.

    python tests/bench/bench_workloads.py --out docs/measurements/DATE-bench [--only STEP ...] [--dry-run]

Two cores, the demo model in bf16, prompts of 300 to 1500 tokens: what carries over are the ratios between arms of one run. The
engines' own cache is made small (5k tokens), so that a few documents are memory pressure. All arms of a step are up at once, on
the same core, and are asked in turns. LMCache takes part where it is installed (`make bench-quick ARGS=--with-lmcache` installs it beside
the environment). Each step has a budget, writes as it goes, and can be repeated by itself; --lock FILE waits for a lock around each.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pdserve.bench import suite
from pdserve.bench.suite import Load
from pdserve.errors import PdserveError, StartError

TOPOLOGY = """
name: bench-{name}
model: demo
engine:
  device: cpu
  dtype: bfloat16
  max_model_len: {length}
  max_num_seqs: 8
  kv_cache_space_gib: 1
  extra_args: ["--num-gpu-blocks-override", "{blocks}"]
  env: {{VLLM_SERVER_DEV_MODE: "1"}}
{machines}
cache: {{size: 2GiB, admin_port: 23590, tiers: {tiers}}}
proxy: {{port: 23510}}
"""
ONE = "both: [{port: 23530, cpus: '0'}]"
TWO = "prefill: [{port: 23511, cpus: '0'}]\ndecode: [{port: 23521, cpus: '1'}]"
REDIS_PORT = 23540


def topology(name: str, machines: str, length: int = 4096, share: float = 1.25, tiers: str = "[]") -> str:
    """The engine's own cache holds `share` of its longest prompt, in blocks of 128 tokens."""
    blocks = round(length * share) // 128
    return TOPOLOGY.format(name=name, machines=machines, length=length, blocks=blocks, tiers=tiers)


TOPOLOGIES = {
    "one": topology("one", ONE),
    "two": topology("two", TWO),
    "small": topology("small", ONE, length=2048),
    "small-two": topology("small-two", TWO, length=2048),
    # the engine's own cache holds one prompt of four, and the DRAM tier is emptied before they are asked again
    "remote": topology("remote", ONE, share=1.04, tiers=f'["redis://127.0.0.1:{REDIS_PORT}/0"]'),
}
PAIR = ("gpu-cache", "cache")
AGENTS = "trace-replay --trace-directory {traces} --scale 0.02 --max-context 1600 --time-scale 0.05 --max-delay 2 --max-output 12"
RANDOM = "random --num-prompts 6 --random-input-len 1000 --random-output-len 16 --max-concurrency 2"
TALK = "multi-round-qa --num-users 4 --num-rounds 5 --qps 0.4 --shared-system-prompt 200 --user-history-prompt 1200 --answer-len 8 "
TALK += "--synthetic-answers --time 22 --duration 22 --warmup 10 --slo-ttft 1"
CHATS = "sharegpt --dataset-path {out}/conversations.json --num-conversations 6 --max-rounds 3 --output-len 8"
LOADS = (
    Load("long-doc-qa", "long-doc-qa --num-documents 4 --document-length 1500 --output-len 8 --repeat-count 1 --repeat-mode tile "
         "--max-inflight-requests 1", 20),
    Load("random", RANDOM, 14),
    Load("all-hit", "all-hit --num-prompts 2 --num-requests 10 --prompt-len 1500 --output-len 16 --max-inflight-requests 2", 14),
    Load("multi-round-qa", TALK, 26, arms=PAIR),
    Load("trace-replay", f"{AGENTS} --users 4 --duration 16 --warmup 3 --slo-ttft 1", 20, arms=PAIR),
    Load("cache-rate", "cache-rate --rates 0,50,100 --num-requests 2 --prompt-len 1500 --num-prefixes 4 --output-len 4", 20, arms=PAIR),
    Load("chat-docs", "chat-docs --num-documents 4 --document-length 1500 --num-users 6 --num-rounds 2 --output-len 8 "
         "--max-inflight-requests 2", 16, arms=PAIR),
    Load("rag", "rag --num-requests 8 --num-templates 2 --template-len 600 --num-chunks 20 --chunk-len 150 --chunks-per-request 3 "
         "--output-len 8 --keep-order", 14, arms=PAIR),
    Load("doc-analysis", "doc-analysis --num-documents 10 --document-length 400 --output-len 8", 10, arms=PAIR),
    Load("sharegpt", CHATS, 10, arms=PAIR),
    Load("working-set", "working-set --working-sets 3000,7500 --document-length 1500 --num-requests 3 --output-len 4", 22, arms=PAIR),
)  # fmt: skip
#: where nothing can be gained: short turns, and many, since one more makes the interval narrower
NOTHING = (
    Load("no-reuse", RANDOM, 8, rounds=60),
    Load("low-load", "chat-docs --num-documents 2 --document-length 1200 --num-users 4 --num-rounds 3 --output-len 8 "
         "--max-inflight-requests 1", 8, rounds=60),
)  # fmt: skip
#: two arms only, so that there is time for more turns
AGAIN = (
    Load("sharegpt", CHATS, 7, rounds=6),
    Load("multi-round-qa", TALK, 24),
    Load("trace-replay", f"{AGENTS} --users 4 --duration 16 --warmup 3 --slo-ttft 1", 20),
)  # fmt: skip
INTERFERENCE = Load(
    "pd-interference",
    "pd-interference --streams 2 --stream-prompt-len 60 --stream-output-len 100 --prefill-len 1500 --num-prefills 3 --prefill-rate 0.4",
    30,
)
#: each prompt once; the second time the same, since the seed is
REMOTE = "bench random bench-remote --num-prompts 4 --random-input-len 3000 --random-output-len 4 --max-concurrency 1 --repetitions 3 "
REMOTE += "--settle 0.5 --max-client-overhead 0 --quiet --out {out} --name"
CHECKED = "--num-documents 4 --document-length 1500 --output-len 8 --repeat-count 2 --max-inflight-requests 1"


@dataclass(frozen=True)
class Step:
    """`seconds` with starting and stopping. Either loads on one set of arms, or lines that follow `pdserve`. `redis`: a server of
    its own is up meanwhile."""

    name: str
    seconds: int
    topology: str
    arms: str = ""
    loads: tuple[Load, ...] = ()
    lines: tuple[str, ...] = ()
    redis: bool = False


REGIMES = "bench regimes --requests 3 --output-len 2 --repetitions 3 --settle 0.3 --quiet"
STEPS = (
    Step("workloads", 720, "one", "gpu-cache,cache,lmcache", LOADS),
    Step("no-loss", 1500, "one", "gpu-cache,cache", NOTHING),
    Step("again", 400, "one", "gpu-cache,cache", AGAIN),
    Step("pd-interference", 270, "two", "gpu-cache,pd", (INTERFERENCE,)),
    # Each arm anew in each turn: on a CPU one engine's prefill is up to a fifth quicker than the next one's, as long as they live.
    Step("regimes", 960, "small", lines=(
        f"{REGIMES} --topology {{small}} --arms gpu-cache,cache-always,cache --working-sets 2000,6000 --lengths 300,1500 --reuse 0,90 "
        "--users 1,3 --out {out} --name regimes",
    )),
    Step("pd-regimes", 300, "small-two", lines=(
        f"{REGIMES} --topology {{small-two}} --arms cache,pd+cache,pd+adaptive --working-sets 3000 --lengths 300,1500 --reuse 0,90 "
        "--users 1 --keep-up --budget 270 --out {out} --name pd-regimes",
    )),
    Step("size", 150, "one", lines=(
        "launch {one} --detach",
        "size --measure bench-one --model demo --save {out}/speeds.json",
        f"bench long-doc-qa bench-one {CHECKED} --repetitions 2 --max-client-overhead 0 --out {{out}} --name size-run",
        "size --model demo --speeds {out}/speeds.json --workload long-doc-qa --workload-args {checked} --users 1 --sizes 2 "
        "--check {out}/size-run.json --json",
        "stop bench-one",
    )),
    Step("remote", 200, "remote", redis=True, lines=(
        "launch {remote} --detach",
        f"{REMOTE} remote-miss",
        "cache clear --admin-port 23590",
        f"{REMOTE} remote-hit",
        "stop bench-remote",
    )),
)  # fmt: skip
STOP_SECONDS = 30.0
SAID = "the cache keeps what a model has read so that it need not read it again when somebody asks about it later"


def write_inputs(out: Path) -> None:
    """Topologies, and conversations of the kind that people share: many, mostly short, some long."""
    (out / "topologies").mkdir(parents=True, exist_ok=True)
    for name, text in TOPOLOGIES.items():
        (out / "topologies" / f"{name}.yaml").write_text(text)
    rng = random.Random(7)
    words = SAID.split()

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words) for _ in range(int(low * (high / low) ** rng.random())))

    rows = [
        {
            "id": str(n),
            "conversations": [{"from": who, "value": text(20, 500)} for _ in range(3) for who in ("human", "gpt")],
        }
        for n in range(12)
    ]
    (out / "conversations.json").write_text(json.dumps(rows))


def facts(out: Path, traces: Path) -> dict[str, str]:
    found = {name: str(out / "topologies" / f"{name}.yaml") for name in TOPOLOGIES}
    return found | {"out": str(out), "traces": str(traces), "checked": shlex.quote(json.dumps(CHECKED.split()))}


def words_of(step: Step, load: Load, known: dict[str, str]) -> list[str]:
    """A load as `pdserve bench` takes it, with what is the same for all."""
    common = f"--arms {step.arms} --topology {known[step.topology]} --out {known['out']} --name {load.name} --quiet --settle 0.5"
    return [*load.words.format(**known).split(), *common.split(), "--max-client-overhead", "0"]


def lines_of(step: Step, known: dict[str, str]) -> list[list[str]]:
    return [shlex.split(line.format(**known)) for line in step.lines]


def run_lines(step: Step, known: dict[str, str], until: float) -> str:
    """One after another; what stops a deployment runs also when something before it failed."""
    ended = "to its end"
    for words in lines_of(step, known):
        if ended == "to its end" or words[0] == "stop":
            say(f"pdserve {shlex.join(words)}")
            ended = _run_line(words, Path(known["out"]), max(30.0, until - STOP_SECONDS - time.monotonic())) or ended
    return ended


def _run_line(words: list[str], out: Path, limit: float) -> str:
    """Why it failed, in a sentence; "" if it did not."""
    what = f"`pdserve {shlex.join(words[:2])}`"
    with contextlib.ExitStack() as stack:
        save = stack.enter_context((out / "size-check.json").open("w")) if "--check" in words else None
        told = stack.enter_context(tempfile.TemporaryFile("w+"))
        process = stack.enter_context(
            subprocess.Popen([sys.executable, "-P", "-m", "pdserve", *words], stdout=save, stderr=told)
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            _interrupt(process)
            return f"{what} took longer than {limit:.0f} s"
        except BaseException:
            _interrupt(process)
            raise
        told.seek(0)
        lines = [line for line in told.read().splitlines() if line.strip()]
    say("\n".join(lines))
    # regimes answers 1 where the adaptive arm is behind: that is a result, not a failure
    if code > (words[1:2] == ["regimes"]):
        return f"{what} failed: {lines[-1] if lines else f'exit code {code}'}"
    return ""


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C does, so that it stops what it started; killed it would leave engines behind."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


def run(step: Step, known: dict[str, str]) -> dict[str, object]:
    """What fails is told in a sentence; the steps after it are run all the same."""
    began = time.monotonic()
    say(f"## {step.name}, at most {step.seconds} s")
    try:
        with redis() if step.redis else contextlib.nullcontext():
            if step.loads:
                todo = {load.name: suite.parsed(words_of(step, load, known)) for load in step.loads}
                ended = suite.run(step.loads, todo, step.seconds, STOP_SECONDS, say)
            else:
                ended = run_lines(step, known, began + step.seconds)
    except (PdserveError, OSError) as error:
        ended = f"failed: {error}"
    took = round(time.monotonic() - began, 1)
    say(f"## {step.name}: {ended}, {took:.0f} s")
    return {"step": step.name, "ended": ended, "seconds": took, "load_average": os.getloadavg()}


@contextlib.contextmanager
def redis() -> Iterator[None]:
    """A server that keeps nothing on disk, until the step ends."""
    if shutil.which("redis-server") is None:
        raise StartError("redis-server is not installed (scripts/setup.py --test-servers installs it)")
    words = ["redis-server", "--port", str(REDIS_PORT), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        try:
            until = time.monotonic() + 10
            while not _answers(REDIS_PORT):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise StartError(f"redis-server did not come up on port {REDIS_PORT}: {log.read()[-300:]}")
                time.sleep(0.1)
            yield
        finally:
            process.terminate()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def locked(file: Path | None) -> Iterator[None]:
    """Engines of two measurements would measure each other."""
    if file is None:
        yield
        return
    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    print(text, flush=True)


def dry_run(chosen: list[Step], known: dict[str, str]) -> None:
    for step in chosen:
        for load in step.loads:
            suite.parsed(words_of(step, load, known))
            say(
                f"{step.name}: {load.rounds} x pdserve bench {load.words.format(**known)} ({', '.join(load.arms) or step.arms})"
            )
        for words in lines_of(step, known):
            say(f"{step.name}: pdserve {shlex.join(words)}")
    say(f"about {sum(step.seconds for step in chosen) / 60:.0f} minutes in all")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where results go")
    parser.add_argument(
        "--traces", type=Path, default=Path("../shared/traces"), help="kv-cache-tester's (default %(default)s)"
    )
    parser.add_argument("--only", nargs="+", choices=[s.name for s in STEPS], help="these steps only")
    parser.add_argument("--lock", type=Path, help="wait for this lock around each step")
    parser.add_argument("--dry-run", action="store_true", help="print commands and minutes, start nothing")
    args = parser.parse_args()
    os.environ["PYTHONSAFEPATH"] = "1"
    write_inputs(args.out)
    known = facts(args.out, args.traces)
    chosen = [s for s in STEPS if not args.only or s.name in args.only]
    if args.dry_run:
        dry_run(chosen, known)
        return 0
    file = args.out / "steps.json"
    done: list[dict[str, object]] = json.loads(file.read_text()) if file.exists() else []
    for step in chosen:
        with locked(args.lock):
            done = [d for d in done if d["step"] != step.name] + [run(step, known)]
        file.write_text(json.dumps(done, indent=1))
    return 0 if all(d["ended"] == "to its end" or "left out" in str(d["ended"]) for d in done) else 1


if __name__ == "__main__":
    raise SystemExit(main())

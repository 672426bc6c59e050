"""Real vLLM at parallel sizes 2 and 1 over one cache: python -P tests/parallel/check.py [--soak SECONDS] [--out JSON]

Two engines of the demo model padded to 4 KV heads, on the CPU in float32, tensor parallel size 2 on the first port, 1 on the
second. For each way (2 to 1, 1 to 2, 2 to 2): a prompt is computed and stored by the one and loaded by the other, as a prefill
and a decode leg; greedy tokens must be those that the other computes by itself, and its whole chunks, stored once more after
the cache was emptied, must have the digests that the first one's had. Then both are put under load: requests with shared
prefixes, clients that leave, caches that are emptied; each answer has a deadline, and nothing may be left behind. Takes 5
minutes with 150 s of load, needs 12 GiB.
With --gpus MODEL the same on two GPUs, or three where they are; with --pp, too, a pipeline of two stages instead of two tensor
parallel workers. (vLLM's engine on the CPU does not survive a pipeline.) --dry-run shows what would be started, and needs no GPU.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from pdserve import chunk, env, topology
from pdserve import target as targets
from pdserve.chunk import ChunkLayout, KeyChain
from pdserve.deploy import plan
from pdserve.openai_client import Client, total
from pdserve.transfer.client import CacheClient

TOPOLOGY = """
name: check-parallel-PORT
model: demo-tp
engine:
  device: cpu
  dtype: float32
  max_model_len: 2048
  max_num_seqs: 8
  kv_cache_space_gib: 1
  env: {VLLM_SERVER_DEV_MODE: "1"}
both:
  - {port: PORT01, cpus: "0|1", tensor_parallel_size: 2}
  - {port: PORT02, cpus: "0"}
cache: {size: 512MiB, admin_port: PORT90, load: always, layer_groups: GROUPS}
proxy: {port: PORT10}
"""
GPU = """
name: check-parallel-PORT
model: MODEL
engine: {dtype: DTYPE, max_model_len: 2048, gpu_memory_utilization: SHARE, env: {VLLM_SERVER_DEV_MODE: "1"}, extra_args: ARGS}
both:
  - {port: PORT01, gpus: [0, 1], PARALLEL: 2}
  - {port: PORT02, gpus: [ALONE]}
cache: {size: 4GiB, admin_port: PORT90, load: always, layer_groups: GROUPS}
proxy: {port: PORT10}
"""
MODEL = TWO = ONE = ADMIN = ""
DEADLINE = 90.0
ASK = {"do_remote_decode": True, "do_remote_prefill": False}


def topology_text(args: argparse.Namespace) -> str:
    parallel = "pipeline_parallel_size" if args.pp else "tensor_parallel_size"
    words = {"MODEL": args.gpus or "", "DTYPE": args.dtype, "PARALLEL": parallel, "ALONE": "2" if gpus() > 2 else "0"}
    words |= {"GROUPS": str(args.layer_groups or "~"), "PORT": str(args.port // 100), "SHARE": str(args.memory)}
    words["ARGS"] = f"['--num-gpu-blocks-override', '{args.blocks}']" if args.blocks else "[]"
    text = GPU if args.gpus else TOPOLOGY
    for word, value in words.items():
        text = text.replace(word, value)
    return text


def gpus() -> int:
    """As many as the driver shows; 0 without one."""
    try:
        told = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return 0
    return sum(line.startswith("GPU ") for line in told.stdout.splitlines())


def post(url: str, path: str, body: dict | None = None) -> dict:
    answer = httpx.post(url + path, json=body, timeout=DEADLINE, trust_env=False)
    answer.raise_for_status()
    return answer.json() if answer.content else {}


def complete(url: str, prompt: list[int], out: int, **more: object) -> dict:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": out, "temperature": 0, "ignore_eos": True}
    return post(url, "/v1/completions", {**body, "return_token_ids": True, **more})


def tokens(answer: dict) -> list[int]:
    return answer["choices"][0]["token_ids"]


def retrieved(url: str) -> int:
    """Tokens that this engine has loaded, by its own count."""
    with Client(url) as engine:
        return int(total(engine.metrics(), "vllm:prompt_tokens_by_source_total", source="external_kv_transfer"))


def preempted(url: str) -> int:
    with Client(url) as engine:
        return int(total(engine.metrics(), "vllm:num_preemptions_total"))


def ids(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(100, 40000) for _ in range(n)]


def layout_of(said: str) -> ChunkLayout:
    """Of the way a layout is written in a log: ChunkLayout(name=literal, ...)."""
    call = ast.parse(said, mode="eval").body
    assert isinstance(call, ast.Call), said
    return ChunkLayout(**{str(word.arg): ast.literal_eval(word.value) for word in call.keywords})


def root(folder: Path) -> tuple[bytes, ChunkLayout]:
    """The start of the keys, from what an engine said when it started; all must say the same."""
    found = set()
    for log in sorted((folder / "logs").glob("both-*.log")):
        said = re.search(r"model (\S+), layout (ChunkLayout\(.*\))", log.read_text())
        assert said, f"{log} does not name its layout"
        layout = layout_of(said[2])
        found.add((chunk.root_key(said[1], layout), layout.shards))
    assert len(found) == 1, f"the engines' keys differ: {found}"
    return found.pop()[0], layout


def digests(client: CacheClient, start: bytes, prompt: list[int]) -> list[list[int]]:
    chain = KeyChain(start, 256)
    tail = chain.tail(prompt)
    reply = client.lookup([*chain.full(prompt), *([tail] if tail else [])], 5)
    client.release(reply.lease, 5)
    return [f.digests for f in reply.found]


def stored(client: CacheClient, start: bytes, prompt: list[int]) -> list[list[int]]:
    """Once all chunks are there."""
    until = time.monotonic() + DEADLINE
    want = len(prompt) // 256 + (len(prompt) % 256 >= 16)
    while len(found := digests(client, start, prompt)) < want:
        assert time.monotonic() < until, f"{len(found)} of {want} chunks were stored"
        time.sleep(0.05)
    return found


def reset(url: str) -> None:
    until = time.monotonic() + DEADLINE
    while httpx.post(url + "/reset_prefix_cache", timeout=30, trust_env=False).status_code != 200:
        assert time.monotonic() < until, "the engine's own cache cannot be emptied"
        time.sleep(0.2)


def one_way(name: str, first: str, second: str, client: CacheClient, start: bytes, rng: random.Random) -> dict:
    prompt = ids(rng, 1100)
    handed = complete(first, prompt, 1, stream=False, kv_transfer_params=ASK)
    before = stored(client, start, prompt)
    reset(second)
    earlier = retrieved(second)
    loaded = complete(second, prompt, 24, kv_transfer_params=handed["kv_transfer_params"])
    # What is in the second one's blocks now goes into an emptied cache.
    httpx.delete(ADMIN + "/cache", timeout=30, trust_env=False).raise_for_status()
    complete(second, prompt, 1, stream=False, kv_transfer_params=ASK)
    after = stored(client, start, prompt)
    computed = complete(second, prompt, 24, cache_salt=f"{name}-{rng.random()}")
    result = {
        "loaded": retrieved(second) - earlier,
        "chunks": len(before),
        # The last chunk's block holds generated tokens by now.
        "digests equal": before[:4] == after[:4],
        "tokens equal": tokens(loaded) == tokens(computed),
    }
    print(f"{name}: {result}", flush=True)
    return result


def soak(seconds: float, rng: random.Random) -> dict:
    """Requests to both engines: half of them share one of four prefixes, one in eight is left after a moment."""
    prefixes = [ids(rng, 600) for _ in range(4)]
    until, counts = time.monotonic() + seconds, {"done": 0, "left": 0, "resets": 0, "slowest s": 0.0}

    def client(n: int) -> None:
        own = random.Random(n)
        while time.monotonic() < until:
            url, began = own.choice((TWO, ONE)), time.monotonic()
            prompt = (own.choice(prefixes) if own.random() < 0.5 else ids(own, own.randrange(20, 700))) + ids(own, 30)
            if own.random() < 0.125:
                try:
                    body = {"model": MODEL, "prompt": prompt, "max_tokens": 200, "ignore_eos": True}
                    httpx.post(url + "/v1/completions", json=body, timeout=own.random() * 2, trust_env=False)
                except httpx.TimeoutException:
                    counts["left"] += 1
                continue
            complete(url, prompt, own.randrange(1, 30))
            counts["done"] += 1
            counts["slowest s"] = max(counts["slowest s"], time.monotonic() - began)
            if own.random() < 0.1:
                counts["resets"] += httpx.post(url + "/reset_prefix_cache", timeout=30, trust_env=False).status_code == 200

    earlier = retrieved(TWO), retrieved(ONE), preempted(TWO), preempted(ONE)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(client, n) for n in range(6)]:
            future.result()
    end = time.monotonic() + DEADLINE
    while (status := httpx.get(ADMIN + "/status", timeout=30, trust_env=False).json())["leases"] or status["reservations"]:
        assert time.monotonic() < end, f"left in the cache: {status}"
        time.sleep(0.2)
    counts["seconds"] = round(seconds)
    counts["loaded by 2 / 1"] = [retrieved(TWO) - earlier[0], retrieved(ONE) - earlier[1]]
    counts["preempted in 2 / 1"] = [preempted(TWO) - earlier[2], preempted(ONE) - earlier[3]]
    print(f"load: {counts}", flush=True)
    return counts


def main() -> int:
    global MODEL, TWO, ONE, ADMIN
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--soak", type=float, default=150, help="seconds of load; 0: none (default %(default)s)")
    parser.add_argument("--only-soak", action="store_true", help="leave the comparisons out")
    parser.add_argument("--gpus", metavar="MODEL", help="on GPUs, with this model's folder (an even number of KV heads, or layers)")
    parser.add_argument("--pp", action="store_true", help="a pipeline instead of tensor parallel workers; with --gpus")
    parser.add_argument("--layer-groups", type=int, help="cache.layer_groups (default: as many as are needed)")
    parser.add_argument("--dtype", default="float32", help="on GPUs (default %(default)s, in which tokens must be equal)")
    parser.add_argument("--blocks", type=int, help="on GPUs: so few KV blocks of 16 tokens that requests are preempted; 128 at least")
    parser.add_argument("--memory", type=float, default=0.3, help="share of a GPU's memory for each engine (default %(default)s)")
    parser.add_argument("--port", type=int, default=24100, help="the first of a hundred ports (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="show the commands, and start nothing")
    parser.add_argument("--out", type=Path, help="a file for the results")
    args = parser.parse_args()
    if args.pp and not args.gpus:
        parser.error("--pp needs --gpus MODEL: vLLM's engine on the CPU does not survive a pipeline")
    TWO, ONE, ADMIN = (f"http://127.0.0.1:{args.port + n}" for n in (1, 2, 90))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is stopped then, too
    rng = random.Random()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "topology.yaml"
        file.write_text(topology_text(args))
        top = topology.load(file)
        if args.dry_run:
            print(*(process.shell() for process in plan.make(top, [0, 1]).processes), sep="\n\n")
            return 0
        targets.launch(file)
    results: dict = {}
    try:
        MODEL = httpx.get(TWO + "/v1/models", timeout=30, trust_env=False).json()["data"][0]["id"]
        start, layout = root(env.run_root() / top.name)
        print(f"layout: {layout}", flush=True)
        client = CacheClient(env.run_root() / top.name / "cache.sock", "check")
        client.connect()
        for name, first, second in () if args.only_soak else (("2 to 1", TWO, ONE), ("1 to 2", ONE, TWO), ("2 to 2", TWO, TWO)):
            results[name] = one_way(name, first, second, client, start, rng)
        client.close()
        if args.soak:
            results["load"] = soak(args.soak, rng)
    finally:
        targets.stop(top.name)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1))
    ways = [r for name, r in results.items() if name != "load"]
    return 0 if all(r["digests equal"] and r["tokens equal"] and r["loaded"] >= 1024 for r in ways) else 1


if __name__ == "__main__":
    sys.exit(main())

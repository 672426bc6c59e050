"""`pdserve bench`: measures a running deployment from outside: time to first token cold and warm, and throughput.

Every prompt is new (random English, exact in tokens), so nothing hits by accident; the warm run sends the same again
after the engines' own prefix caches were emptied, where they allow it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from statistics import median, quantiles

from pdserve import output
from pdserve import target as targets
from pdserve.errors import ConfigError
from pdserve.openai_client import Client
from pdserve.prompts import make_ids
from pdserve.target import Target

Ids = tuple[int, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", help="URL or name of a running deployment (default: the one that runs)")
    parser.add_argument("--prompt-tokens", type=int, default=1000, help="length of each prompt (default %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=32, help="length of each answer (default %(default)s)")
    parser.add_argument("--requests", type=int, default=8, help="how many prompts (default %(default)s)")
    parser.add_argument("--concurrency", type=int, default=1, help="requests at a time (default %(default)s)")
    parser.add_argument("--seed", type=int, help="repeat an earlier run's prompts (default: fresh, printed)")
    parser.add_argument("--json", action="store_true", help="as data")


@dataclass(frozen=True, slots=True)
class Throughput:
    """What a batch of requests gave. Seconds and tokens per second; ttft and tpot are of single requests."""

    requests: int
    seconds: float
    output_tokens: int
    tokens_per_s: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    cached_tokens: int


def main(args: argparse.Namespace) -> int:
    if min(args.prompt_tokens, args.output_tokens, args.requests, args.concurrency) < 1:
        raise ConfigError("bench", "--prompt-tokens, --output-tokens, --requests and --concurrency must be positive")
    target = targets.find_running(args.target)
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**9)
    with Client(target.url) as client, output.steps(total=4) as progress:
        progress.step("making prompts", 0)
        prompts = fresh_prompts(client, args.requests, args.prompt_tokens, seed)
        progress.step("cold", 1)
        cold = throughput(client, prompts, args.output_tokens, args.concurrency)
        progress.step("emptying the engines' own caches", 2)
        emptied = settle(target)
        progress.step("warm", 3)
        warm = throughput(client, prompts, args.output_tokens, args.concurrency)
    if args.json:
        print(json.dumps({"seed": seed, "caches_emptied": emptied, "cold": asdict(cold), "warm": asdict(warm)}))
        return 0
    print(f"{args.requests} prompts of {args.prompt_tokens} tokens, {args.concurrency} at a time, seed {seed}")
    print(f"{'':6}{'TTFT p50':>10}{'p99':>8}{'TPOT p50':>10}{'tokens/s':>10}{'cached':>9}")
    for name, t in (("cold", cold), ("warm", warm)):
        times = f"{t.ttft_p50:>10.3f}{t.ttft_p99:>8.3f}{t.tpot_p50:>10.4f}"
        print(f"{name:6}{times}{t.tokens_per_s:>10.1f}{t.cached_tokens:>9}")
    if not emptied:
        print("The engines kept their own prefix caches (no VLLM_SERVER_DEV_MODE): warm may have hit those.")
    return 0


def fresh_prompts(client: Client, count: int, tokens: int, seed: int) -> list[Ids]:
    rng = random.Random(seed)
    return [make_ids(rng, client.tokenize, tokens) for _ in range(count)]


def settle(target: Target, seconds: float = 20.0) -> bool:
    """Waits until what was computed is stored, then empties the engines' own caches. False where they cannot."""
    target.wait_for_no_leases(seconds)
    return target.empty_engine_caches()


def ttft(client: Client, prompt: Sequence[int]) -> tuple[float, int]:
    """Seconds to the first token, and how many prompt tokens the engine says it did not compute."""
    answer = client.complete(prompt, max_tokens=1)
    return answer.ttft, answer.cached_tokens or 0


def throughput(client: Client, prompts: Sequence[Sequence[int]], output_tokens: int, concurrency: int) -> Throughput:
    """Sends all prompts, `concurrency` at a time, each answered with exactly `output_tokens` tokens."""
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        done = list(pool.map(lambda p: client.complete(p, max_tokens=output_tokens, ignore_eos=True), prompts))
    seconds = time.perf_counter() - start
    tokens, firsts = sum(a.completion_tokens for a in done), [a.ttft for a in done]
    return Throughput(
        requests=len(done),
        seconds=seconds,
        output_tokens=tokens,
        tokens_per_s=tokens / seconds,
        ttft_p50=median(firsts),
        ttft_p99=quantiles(firsts, n=100)[98] if len(firsts) > 1 else firsts[0],
        tpot_p50=median(a.tpot for a in done),
        cached_tokens=sum(a.cached_tokens or 0 for a in done),
    )

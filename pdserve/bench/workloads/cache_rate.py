"""A given share of every prompt is in the cache already, 0 to 100 %, while the working set stays the same size.

First the shared beginnings are sent (not measured), then requests that begin with one of them and go on with new text.
"""

from __future__ import annotations

import argparse
import random

from pdserve.bench.plan import Piece, Plan, Stage, single
from pdserve.bench.workloads import add_inflight, scaled
from pdserve.errors import ConfigError

HELP = "0 to 100 percent of each prompt in the cache, at a fixed working set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rates",
        default="0,25,50,75,100",
        help="percent of the prompt that was sent before, one stage each (default %(default)s)",
    )
    parser.add_argument("--num-requests", type=int, default=20, help="per rate (default %(default)s)")
    parser.add_argument("--prompt-len", type=int, default=8000, help="tokens of a prompt (default %(default)s)")
    parser.add_argument(
        "--num-prefixes",
        type=int,
        default=10,
        help="different beginnings: the working set is this times the prompt (default %(default)s)",
    )
    parser.add_argument("--output-len", type=int, default=16, help="tokens of an answer (default %(default)s)")
    add_inflight(parser, 1)


def rates(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        found = [-1]
    if not found or min(found) < 0 or max(found) > 100:
        raise ConfigError("--rates", f"{text!r} is not a list of percentages", "Write it like 0,25,50,75,100.")
    return found


def make(args: argparse.Namespace) -> Plan:
    rng = random.Random(args.seed)
    length, out = scaled(args.prompt_len, args), scaled(args.output_len, args)
    inflight = max(1, args.max_inflight_requests)
    prefixes = [
        single(f"fill-{p}", (Piece(f"prefix-{p}", length),), 1, "fill") for p in range(max(1, args.num_prefixes))
    ]
    stages = [Stage("fill", prefixes, measured=False, concurrency=inflight)]
    for rate in rates(args.rates):
        known = length * rate // 100
        sessions = []
        for number in range(args.num_requests):
            pieces = [
                Piece(f"prefix-{rng.randrange(len(prefixes))}", known),
                Piece(f"new-{rate}-{number}", length - known),
            ]
            sessions.append(single(f"{rate}%-{number}", [p for p in pieces if p.tokens], out, f"{rate} % cached"))
        stages.append(Stage(f"{rate} %", sessions, concurrency=inflight))
    return Plan("cache-rate", args.seed, tuple(stages))

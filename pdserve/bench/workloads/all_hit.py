"""Everything hits, and everything fits the GPU's cache: the workload in which a cache below it can only be in the way."""

from __future__ import annotations

import argparse

from pdserve.bench.plan import Piece, Plan, Stage, single
from pdserve.bench.workloads import add_inflight, scaled

HELP = "a few prompts again and again: all in the GPU's own cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-prompts", type=int, default=4, help="different prompts (default %(default)s)")
    parser.add_argument("--num-requests", type=int, default=60, help="how many requests (default %(default)s)")
    parser.add_argument("--prompt-len", type=int, default=20000, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of an answer (default %(default)s)")
    add_inflight(parser, 4)


def make(args: argparse.Namespace) -> Plan:
    length, out, inflight = (
        scaled(args.prompt_len, args),
        scaled(args.output_len, args),
        max(1, args.max_inflight_requests),
    )
    names = [f"prompt-{p}" for p in range(max(1, args.num_prompts))]
    fill = [single(f"fill {name}", (Piece(name, length),), 1, "fill") for name in names]
    asked = [
        single(f"{names[n % len(names)]}#{n}", (Piece(names[n % len(names)], length),), out)
        for n in range(args.num_requests)
    ]
    return Plan("all-hit", args.seed, (Stage("fill", fill, measured=False), Stage("hits", asked, concurrency=inflight)))

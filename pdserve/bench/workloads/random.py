"""Random prompts: nothing can be reused, and a cache can only cost."""

from __future__ import annotations

import argparse

from pdserve.bench.plan import Piece, Plan, Stage, single
from pdserve.bench.workloads import scaled

HELP = "random prompts: nothing to reuse"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-prompts", type=int, default=100, help="how many prompts (default %(default)s)")
    parser.add_argument("--random-input-len", type=int, default=8000, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--random-output-len", type=int, default=128, help="tokens of an answer (default %(default)s)")
    parser.add_argument("--max-concurrency", type=int, default=4, help="requests at a time (default %(default)s)")


def make(args: argparse.Namespace) -> Plan:
    length, out = scaled(args.random_input_len, args), scaled(args.random_output_len, args)
    sessions = [single(f"prompt-{n}", (Piece(f"prompt-{n}", length),), out) for n in range(args.num_prompts)]
    return Plan("random", args.seed, (Stage("prompts", sessions, concurrency=max(1, args.max_concurrency)),))

"""The same requests over ever more documents: where does each tier stop holding them?

For each size of the working set, every document is sent once (not measured) and then asked for in random order.
"""

from __future__ import annotations

import argparse
import random

from pdserve.bench.plan import Piece, Plan, Stage, single
from pdserve.bench.workloads import add_inflight, scaled
from pdserve.errors import ConfigError

HELP = "one load over ever more documents: the crossover between the tiers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--working-sets",
        default="20000,80000,320000",
        help="tokens of all documents together, one stage pair each (default %(default)s)",
    )
    parser.add_argument("--document-length", type=int, default=4000, help="tokens of a document (default %(default)s)")
    parser.add_argument("--num-requests", type=int, default=20, help="measured, per working set (default %(default)s)")
    parser.add_argument("--output-len", type=int, default=16, help="tokens of an answer (default %(default)s)")
    add_inflight(parser, 1)


def make(args: argparse.Namespace) -> Plan:
    try:
        sizes = [int(float(word)) for word in args.working_sets.split(",") if word.strip()]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ConfigError(
            "--working-sets", f"{args.working_sets!r} is not a list of token counts", "Write it like 20000,80000."
        )
    length, out, inflight = (
        scaled(args.document_length, args),
        scaled(args.output_len, args),
        max(1, args.max_inflight_requests),
    )
    rng, stages = random.Random(args.seed), []
    for size in sizes:
        tokens = scaled(size, args)
        count = max(1, round(tokens / length))
        names = [f"set-{size}/document-{d}" for d in range(count)]
        fill = [single(f"fill {name}", (Piece(name, length),), 1, "fill") for name in names]
        asked = [
            single(
                f"{size}-{n}",
                (Piece(rng.choice(names), length), Piece(f"{size}/question-{n}", 16)),
                out,
                f"set {tokens}",
            )
            for n in range(args.num_requests)
        ]
        stages.append(Stage(f"fill {tokens}", fill, measured=False, concurrency=inflight))
        stages.append(Stage(f"set {tokens}", asked, concurrency=inflight))
    return Plan("working-set", args.seed, tuple(stages))

"""Retrieval: a template, the chunks that a retriever found, a question. Popular chunks come up again, in another order.

Chunks are drawn by Zipf's law. Only the template and a chunk row that begins alike are a common prefix, so a prefix cache
gains what real retrieval lets it gain: `--keep-order` sorts chunks by name, as systems do that want their cache to hit.
"""

from __future__ import annotations

import argparse
import random

from pdserve.bench.plan import Piece, Plan, Stage, single
from pdserve.bench.workloads import add_inflight, scaled

HELP = "templates with overlapping retrieved chunks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-requests", type=int, default=100, help="how many requests (default %(default)s)")
    parser.add_argument("--num-templates", type=int, default=4, help="different templates (default %(default)s)")
    parser.add_argument("--template-len", type=int, default=600, help="tokens of a template (default %(default)s)")
    parser.add_argument("--num-chunks", type=int, default=200, help="chunks in the store (default %(default)s)")
    parser.add_argument("--chunk-len", type=int, default=500, help="tokens of a chunk (default %(default)s)")
    parser.add_argument(
        "--chunks-per-request", type=int, default=6, help="chunks that the retriever finds (default %(default)s)"
    )
    parser.add_argument(
        "--skew", type=float, default=1.0, help="Zipf exponent of the chunks' popularity (default %(default)s)"
    )
    parser.add_argument(
        "--keep-order", action="store_true", help="chunks in a fixed order, so that prefixes repeat more often"
    )
    parser.add_argument("--question-len", type=int, default=30, help="tokens of a question (default %(default)s)")
    parser.add_argument("--output-len", type=int, default=100, help="tokens of an answer (default %(default)s)")
    add_inflight(parser, 4)


def make(args: argparse.Namespace) -> Plan:
    rng = random.Random(args.seed)
    weights = [1 / (rank + 1) ** args.skew for rank in range(args.num_chunks)]
    sessions = []
    for number in range(args.num_requests):
        found = _draw(rng, weights, min(args.chunks_per_request, args.num_chunks))
        if args.keep_order:
            found.sort()
        pieces = [Piece(f"template-{rng.randrange(args.num_templates)}", scaled(args.template_len, args), "system")]
        pieces += [Piece(f"chunk-{c}", scaled(args.chunk_len, args)) for c in found]
        pieces.append(Piece(f"question-{number}", scaled(args.question_len, args, 4)))
        sessions.append(single(f"request-{number}", pieces, scaled(args.output_len, args)))
    return Plan("rag", args.seed, (Stage("requests", sessions, concurrency=max(1, args.max_inflight_requests)),))


def _draw(rng: random.Random, weights: list[float], count: int) -> list[int]:
    """`count` different chunks, the popular ones more often."""
    found: dict[int, None] = {}
    while len(found) < count:
        found[rng.choices(range(len(weights)), weights)[0]] = None
    return list(found)

"""Questions about long documents, each asked several times: LMCache's long_doc_qa.py.

A first round reads every document once; the query round then repeats each, in an order that makes it easy or hard for a
cache: `tile` goes through all documents before the next repeat, `interleave` repeats each at once, `random` shuffles.
"""

from __future__ import annotations

import argparse
import random

from pdserve.bench.plan import Piece, Plan, Session, Stage, single
from pdserve.bench.workloads import add_inflight, scaled
from pdserve.errors import ConfigError

HELP = "questions about long documents, each repeated (LMCache's long_doc_qa.py)"
QUESTION_TOKENS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-documents", type=int, default=8, help="how many documents (default %(default)s)")
    parser.add_argument("--document-length", type=int, default=20000, help="tokens of a document (default %(default)s)")
    parser.add_argument("--output-len", type=int, default=100, help="tokens of an answer (default %(default)s)")
    parser.add_argument(
        "--repeat-count", type=int, default=2, help="queries per document in the query round (default %(default)s)"
    )
    parser.add_argument(
        "--repeat-mode",
        choices=("random", "tile", "interleave"),
        default="random",
        help="order of the repeats (default %(default)s)",
    )
    parser.add_argument("--shuffle-seed", type=int, default=0, help="of the random order (default %(default)s)")
    add_inflight(parser, 2)
    parser.add_argument(
        "--hit-miss-ratio", metavar="H:M", help="mix misses into the query round, e.g. 3:1 (default: hits only)"
    )


def make(args: argparse.Namespace) -> Plan:
    length, out = scaled(args.document_length, args), scaled(args.output_len, args)
    first = [_ask(f"doc-{d}", 0, length, out, "first") for d in range(args.num_documents)]
    repeats = [
        _ask(f"doc-{d}" if hit else f"miss-{d}-{turn}", turn, length, out, "repeat" if hit else "miss")
        for turn, (d, hit) in enumerate(_order(args), 1)
    ]
    inflight = max(1, args.max_inflight_requests)
    stages = (Stage("first round", first, concurrency=inflight), Stage("query round", repeats, concurrency=inflight))
    return Plan("long-doc-qa", args.seed, stages, {"document_tokens": length})


def _ask(document: str, turn: int, length: int, out: int, group: str) -> Session:
    question = Piece(f"{document}/question-{turn}", QUESTION_TOKENS)
    return single(f"{document}#{turn}", (Piece(document, length), question), out, group)


def _order(args: argparse.Namespace) -> list[tuple[int, bool]]:
    """(document, whether it is one of the first round) for every request of the query round."""
    documents = range(args.num_documents)
    if args.repeat_mode == "interleave":
        order = [d for d in documents for _ in range(args.repeat_count)]
    else:
        order = [d for _ in range(args.repeat_count) for d in documents]
    if args.repeat_mode == "random":
        random.Random(args.shuffle_seed).shuffle(order)
    if not args.hit_miss_ratio:
        return [(d, True) for d in order]
    hits, _, misses = args.hit_miss_ratio.partition(":")
    if not (hits.isdigit() and misses.isdigit() and int(hits) + int(misses)):
        raise ConfigError("--hit-miss-ratio", f"{args.hit_miss_ratio!r} is not H:M", "Write it like 3:1.")
    period = int(hits) + int(misses)
    return [(d, i % period < int(hits)) for i, d in enumerate(order)]

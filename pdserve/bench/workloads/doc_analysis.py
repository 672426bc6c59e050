"""Many short documents, one question each, behind one instruction: 320 documents of 400 tokens.

Nearly nothing can be reused, and what can is short: the workload where a cache mostly costs.
"""

from __future__ import annotations

import argparse

from pdserve.bench.plan import Piece, Plan, Stage, single
from pdserve.bench.workloads import add_inflight, scaled

HELP = "320 short documents of 400 tokens behind one instruction"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-documents", type=int, default=320, help="how many documents (default %(default)s)")
    parser.add_argument("--document-length", type=int, default=400, help="tokens of a document (default %(default)s)")
    parser.add_argument(
        "--instruction-len", type=int, default=60, help="tokens that all requests share (default %(default)s)"
    )
    parser.add_argument("--output-len", type=int, default=50, help="tokens of an answer (default %(default)s)")
    add_inflight(parser, 8)


def make(args: argparse.Namespace) -> Plan:
    instruction = Piece("instruction", scaled(args.instruction_len, args))
    length, out = scaled(args.document_length, args), scaled(args.output_len, args)
    sessions = [
        single(f"document-{d}", (instruction, Piece(f"document-{d}", length)), out) for d in range(args.num_documents)
    ]
    return Plan(
        "doc-analysis", args.seed, (Stage("documents", sessions, concurrency=max(1, args.max_inflight_requests)),)
    )

"""Steady answers while long prompts arrive: what prefills do to the time between other people's tokens.

Stage `idle`: the streams alone. Stage `busy`: the same streams, and long prompts at Poisson times. Both in one run, so that
one machine's idle time is compared with its own.
"""

from __future__ import annotations

import argparse
import random

from pdserve.bench.plan import Piece, Plan, Session, Stage, single
from pdserve.bench.workloads import scaled

HELP = "steady answers while long prompts arrive: time between tokens"
LEAD = 1.0  # seconds of streams alone before the first long prompt may come


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--streams", type=int, default=8, help="answers that are written all the time (default %(default)s)"
    )
    parser.add_argument("--stream-prompt-len", type=int, default=200, help="tokens of a prompt (default %(default)s)")
    parser.add_argument("--stream-output-len", type=int, default=512, help="tokens of a stream (default %(default)s)")
    parser.add_argument("--prefill-len", type=int, default=20000, help="tokens of a long prompt (default %(default)s)")
    parser.add_argument(
        "--prefill-output-len",
        type=int,
        default=1,
        help="tokens that a long prompt is answered with (default %(default)s)",
    )
    parser.add_argument("--num-prefills", type=int, default=8, help="how many long prompts (default %(default)s)")
    parser.add_argument(
        "--prefill-rate", type=float, default=1.0, help="long prompts a second (Poisson) (default %(default)s)"
    )


def make(args: argparse.Namespace) -> Plan:
    rng = random.Random(args.seed)
    busy = [*_streams(args, "busy")]
    at = LEAD
    for number in range(args.num_prefills):
        at += rng.expovariate(args.prefill_rate)
        prompt = Piece(f"long-{number}", scaled(args.prefill_len, args))
        busy.append(single(f"long-{number}", (prompt,), args.prefill_output_len, "prefill", start=at))
    stages = (Stage("idle", list(_streams(args, "idle")), given=True), Stage("busy", busy, given=True))
    return Plan("pd-interference", args.seed, stages)


def _streams(args: argparse.Namespace, stage: str) -> list[Session]:
    length, out = scaled(args.stream_prompt_len, args, 8), scaled(args.stream_output_len, args, 8)
    return [
        single(f"{stage}-{n}", (Piece(f"{stage}-{n}", length),), out, f"decode, {stage}", start=0.0)
        for n in range(args.streams)
    ]

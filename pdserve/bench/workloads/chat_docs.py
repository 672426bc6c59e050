"""Chat about a few long documents: every user opens one of 15 documents of 20k tokens and asks several questions about it."""

from __future__ import annotations

import argparse
import random

from pdserve.bench.plan import Piece, Plan, Session, Stage, Step
from pdserve.bench.workloads import add_conversation_pace, scaled

HELP = "conversations about 15 documents of 20k tokens"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-documents", type=int, default=15, help="how many documents (default %(default)s)")
    parser.add_argument("--document-length", type=int, default=20000, help="tokens of a document (default %(default)s)")
    parser.add_argument(
        "--num-users", type=int, default=30, help="conversations; each takes a document by chance (default %(default)s)"
    )
    parser.add_argument("--num-rounds", type=int, default=3, help="questions of a conversation (default %(default)s)")
    parser.add_argument("--question-len", type=int, default=50, help="tokens of a question (default %(default)s)")
    parser.add_argument("--output-len", type=int, default=100, help="tokens of an answer (default %(default)s)")
    add_conversation_pace(parser)


def make(args: argparse.Namespace) -> Plan:
    rng, seen = random.Random(args.seed), set[int]()
    sessions = []
    for user in range(args.num_users):
        document = rng.randrange(args.num_documents)
        sessions.append(_conversation(args, user, document, document in seen))
        seen.add(document)
    stage = Stage("chat", sessions, concurrency=max(1, args.max_inflight_requests))
    return Plan("chat-docs", args.seed, (stage,), chat=True)


def _conversation(args: argparse.Namespace, user: int, document: int, known: bool) -> Session:
    answer, question = scaled(args.output_len, args), scaled(args.question_len, args, 4)
    talk = [Piece(f"document-{document}", scaled(args.document_length, args), "system")]
    steps = []
    for turn in range(args.num_rounds):
        talk.append(Piece(f"user-{user}/question-{turn}", question))
        group = "later round" if turn else ("known document" if known else "new document")
        steps.append(Step(tuple(talk), answer, group, think=args.think if turn else 0.0))
        talk.append(Piece(f"user-{user}/answer-{turn}", answer, "assistant", answer_of=turn))
    return Session(f"user-{user}", tuple(steps))

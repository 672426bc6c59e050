"""Users in conversation: production-stack's and LMCache's multi-round-qa.py.

Every user sends a round each num_users/qps seconds, on a schedule that does not wait for slow answers: a round that is
held up by the one before counts from when it was due. Users join and leave all the time, so that the first are met in
the middle of their conversations, as in the known script. Prompts grow by the answers that the server itself gave.
"""

from __future__ import annotations

import argparse

from pdserve.bench.plan import Piece, Plan, Session, Stage, Step
from pdserve.bench.workloads import scaled
from pdserve.errors import ConfigError

HELP = "users in conversation, joining and leaving (multi-round-qa.py)"
QUESTION_TOKENS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-users", type=int, default=20, help="conversations at a time (default %(default)s)")
    parser.add_argument("--num-rounds", type=int, default=6, help="questions of a conversation (default %(default)s)")
    parser.add_argument(
        "--qps", type=float, default=0.5, help="rounds a second, of all users together (default %(default)s)"
    )
    parser.add_argument(
        "--shared-system-prompt",
        type=int,
        default=1000,
        metavar="N",
        help="tokens that all users share (default %(default)s)",
    )
    parser.add_argument(
        "--user-history-prompt",
        type=int,
        default=2000,
        metavar="N",
        help="tokens of each user's own history (default %(default)s)",
    )
    parser.add_argument("--answer-len", type=int, default=100, help="tokens of an answer (default %(default)s)")
    parser.add_argument(
        "--time", type=float, default=100.0, metavar="S", help="seconds in which users join (default %(default)s)"
    )
    parser.add_argument(
        "--synthetic-answers", action="store_true", help="prompts grow by made-up answers, the same in every arm"
    )


def make(args: argparse.Namespace) -> Plan:
    if args.qps <= 0 or args.num_users < 1 or args.num_rounds < 1:
        raise ConfigError("--qps, --num-users, --num-rounds", "must be positive")
    gap = args.num_users / args.qps  # between two rounds of one user
    apart = gap * args.num_rounds / args.num_users  # between two users who join
    sessions = []
    for user in range(args.num_users):  # those who are there already, spread over their conversations
        left = args.num_rounds - user * args.num_rounds // args.num_users
        sessions.append(_user(args, f"user-{user}", args.num_rounds - left, user * gap / args.num_users, gap))
    joined = 0
    while (joined + 1) * apart < args.time:
        joined += 1
        sessions.append(_user(args, f"user-{args.num_users + joined - 1}", 0, joined * apart, gap))
    sessions.sort(key=lambda s: s.start or 0.0)
    return Plan("multi-round-qa", args.seed, (Stage("rounds", sessions, given=True),), {"gap_s": gap}, chat=True)


def _user(args: argparse.Namespace, name: str, done: int, start: float, gap: float) -> Session:
    """The rounds from `done` on; those before stand in the history as made-up text."""
    answer = scaled(args.answer_len, args)
    system = Piece("system", scaled(args.shared_system_prompt, args), "system")
    history = Piece(f"{name}/history", scaled(args.user_history_prompt, args))
    steps = []
    for turn in range(done, args.num_rounds):
        talk = [system, history]
        for before in range(turn):
            asked = -1 if args.synthetic_answers or before < done else before - done
            talk.append(Piece(f"{name}/question-{before}", QUESTION_TOKENS))
            talk.append(Piece(f"{name}/answer-{before}", answer, "assistant", answer_of=asked))
        talk.append(Piece(f"{name}/question-{turn}", QUESTION_TOKENS))
        steps.append(Step(tuple(talk), answer, f"round {turn + 1}", at=(turn - done) * gap))
    return Session(name, tuple(steps), start)

"""Conversations of a local ShareGPT file: [{"id": .., "conversations": [{"from": "human", "value": ..}, {"from": "gpt", ..}]}].

The humans' turns are sent as they are, behind a few made-up words that all conversations of a run begin with and that are others in
each repetition: without them a repetition would hit what the one before has left in a cache. The prompt grows by the server's own
answers. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import Any

from pdserve.bench.plan import Piece, Plan, Session, Stage, Step
from pdserve.bench.workloads import add_conversation_pace, scaled
from pdserve.errors import ConfigError

HELP = "conversations of a local ShareGPT file"
MARK_TOKENS = 4
CHARACTERS_PER_TOKEN = 4  # for the token counts of the plan only; the server's own are reported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset-path", required=True, metavar="FILE", help="a JSON or JSONL file of conversations")
    parser.add_argument(
        "--num-conversations", type=int, default=50, help="how many, taken by chance (default %(default)s)"
    )
    parser.add_argument("--max-rounds", type=int, default=4, help="longest conversation (default %(default)s)")
    parser.add_argument(
        "--max-turn-characters", type=int, default=8000, help="longer turns are cut (default %(default)s)"
    )
    parser.add_argument("--output-len", type=int, help="tokens an answer (default: as long as the recorded one)")
    add_conversation_pace(parser)


def make(args: argparse.Namespace) -> Plan:
    rows = [row for row in _read(Path(args.dataset_path)) if len(_turns(row)) > 0]
    if not rows:
        raise ConfigError("--dataset-path", f"{args.dataset_path} holds no conversation that a human begins")
    random.Random(args.seed).shuffle(rows)
    sessions = [_session(args, n, _turns(row)) for n, row in enumerate(rows[: args.num_conversations])]
    return Plan(
        "sharegpt", args.seed, (Stage("chat", sessions, concurrency=max(1, args.max_inflight_requests)),), chat=True
    )


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--dataset-path", f"{file} cannot be read: {error}") from error
    try:
        found = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.splitlines() if line]
        )
    except json.JSONDecodeError as error:
        raise ConfigError("--dataset-path", f"{file} is neither JSON nor JSONL: {error}") from error
    return [row for row in found if isinstance(row, dict)]


def _turns(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(question, recorded answer) from the first human turn on."""
    said = [(t.get("from"), str(t.get("value", ""))) for t in row.get("conversations", [])]
    pairs = []
    for (who, question), (other, answer) in itertools.pairwise(said):
        if who in ("human", "user") and other in ("gpt", "assistant", "chatgpt") and question.strip():
            pairs.append((question, answer))
    return pairs


def _session(args: argparse.Namespace, number: int, turns: list[tuple[str, str]]) -> Session:
    talk = [Piece("mark", MARK_TOKENS)]
    steps = []
    cut = max(1, int(args.max_turn_characters * args.scale))
    for turn, (question, recorded) in enumerate(turns[: args.max_rounds]):
        question = question[:cut]
        talk.append(Piece("", max(1, len(question) // CHARACTERS_PER_TOKEN), text=f"\n{question}" if turn == 0 else question))
        length = args.output_len or max(1, len(recorded[:cut]) // CHARACTERS_PER_TOKEN)
        out = scaled(length, args) if args.output_len else length
        steps.append(Step(tuple(talk), out, f"round {turn + 1}", think=args.think if turn else 0.0))
        talk.append(Piece(f"conversation-{number}/answer-{turn}", out, "assistant", answer_of=turn))
    return Session(f"conversation-{number}", tuple(steps))

"""Recorded traffic again: agents' conversations (kv-cache-tester's files) or timed requests (Mooncake's JSONL).

Text is synthetic and repeats where the hash ids do. Each user of a conversation waits its recorded think times, its
sub-agents run beside each other, and a user whose conversation has ended takes the next one; once all were taken they begin
again as other people's (`--no-recycle` ends instead). Timed requests come in at their recorded times.

For small models --scale shrinks lengths: a block of 64 tokens becomes one of 64 x scale, so that what repeats stays the same.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from pdserve.bench import traces
from pdserve.bench.plan import Agent, Piece, Plan, Session, Stage, Step, single
from pdserve.bench.traces import Call, Trace
from pdserve.errors import ConfigError

HELP = "recorded agent conversations or timed requests, with synthetic text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace-directory", required=True, metavar="PATH", help="a folder of traces or one file, plain or gzip"
    )
    parser.add_argument(
        "--users", type=int, default=1, help="conversations at a time (a ramp overrides it) (default %(default)s)"
    )
    parser.add_argument(
        "--time-scale",
        type=float,
        default=1.0,
        help="multiplies think times and recorded arrivals (default %(default)s)",
    )
    parser.add_argument(
        "--max-delay",
        type=float,
        default=60.0,
        metavar="S",
        help="longest think time, after scaling (default %(default)s)",
    )
    parser.add_argument(
        "--max-context",
        type=int,
        default=0,
        metavar="TOKENS",
        help="a conversation ends where it would pass this (default: what the server takes)",
    )
    parser.add_argument(
        "--warm-prefix-pct",
        type=float,
        default=0.5,
        help="part of tools and system prompt that all users share (default %(default)s)",
    )
    parser.add_argument("--max-traces", type=int, default=0, help="take this many, by chance (default: all)")
    parser.add_argument(
        "--max-output",
        type=int,
        default=0,
        metavar="TOKENS",
        help="longest answer, after scaling (default: as recorded)",
    )
    parser.add_argument("--no-recycle", action="store_true", help="end when every conversation was taken once")
    parser.add_argument(
        "--block-size",
        type=int,
        default=0,
        help="tokens of a block (default: as the file says; Mooncake's: 512)",
    )


def make(args: argparse.Namespace) -> Plan:
    if not 0 <= args.warm_prefix_pct <= 1:
        raise ConfigError("--warm-prefix-pct", f"{args.warm_prefix_pct:g} is not a part", "Give 0 to 1.")
    found = [t for t in traces.read(Path(args.trace_directory), args.block_size) if _fits(t.calls[:1], args)]
    if not found:
        fix = "Raise --max-context, or shrink lengths with --scale."
        raise ConfigError("--trace-directory", f"no trace in {args.trace_directory} begins within the context", fix)
    facts: dict[str, object] = {"traces": len(found)}
    if found[0].start is not None:
        sessions = [_timed(trace, args) for trace in found]
        return Plan("trace-replay", args.seed, (Stage("trace", sessions, given=True),), facts)
    random.Random(args.seed).shuffle(found)
    found = found[: args.max_traces or None]
    stages: list[Stage] = []
    warm = max((_shared_tokens(t.shared_tokens, args) for t in found), default=0)
    if warm:
        pieces = tuple(Blocks("shared", range(warm // found[0].block_tokens), found[0].block_tokens, args.scale, {}))
        if pieces:
            stages.append(Stage("warm prefix", [single("warm-prefix", pieces, 1, "fill")], measured=False))
    endless = not args.no_recycle
    stages.append(
        Stage("conversations", Conversations(found, args, endless), concurrency=max(1, args.users), endless=endless)
    )
    return Plan("trace-replay", args.seed, tuple(stages), facts)


@dataclass(frozen=True)
class Blocks(Sequence[Piece]):
    """The pieces of a prompt, made when they are wanted: a prompt of 150k tokens has 2300 blocks, a trace hundreds of prompts.

    `shared` maps the first places of the prompt to text that all conversations share.
    """

    scope: str
    ids: Sequence[int]
    block_tokens: int
    scale: float
    shared: dict[int, str]
    tail: tuple[Piece, ...] = ()

    def __len__(self) -> int:
        return len(self.ids) + len(self.tail)

    def __iter__(self) -> Iterator[Piece]:
        width = self.block_tokens * self.scale
        end = 0
        for place, block in enumerate(self.ids):
            begin, end = end, round((place + 1) * width)
            if end > begin:
                yield Piece(self.shared.get(place) or f"{self.scope}:{block}", end - begin)
        yield from self.tail

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Piece]: ...
    def __getitem__(self, index: int | slice) -> Piece | Sequence[Piece]:
        return tuple(self)[index]


@dataclass(frozen=True)
class Conversations:
    """Sessions one after another, without end when `endless`; each time round is other people's text."""

    found: list[Trace]
    args: argparse.Namespace
    endless: bool

    def __iter__(self) -> Iterator[Session]:
        turn = 0
        while True:
            for trace in self.found:
                yield conversation(trace, f"{trace.name}@{turn}", self.args)
            turn += 1
            if not self.endless:
                return


def conversation(trace: Trace, name: str, args: argparse.Namespace) -> Session:
    first = trace.calls[0].ids if trace.calls else ()
    shared = _shared_tokens(trace.shared_tokens, args) // trace.block_tokens
    places = {i: f"shared:{i}" for i in range(min(shared, len(first)))}
    return Session(name, _steps(trace.calls, name, name, places, first, trace.block_tokens, args))


def _steps(
    calls: tuple[Call, ...],
    name: str,
    scope: str,
    places: dict[int, str],
    first: Sequence[int],
    block: int,
    args: argparse.Namespace,
) -> tuple[Step, ...]:
    """`scope` names the file's ids; `places` are shared as long as the prompt still begins with the ids in `first`."""
    steps: list[Step] = []
    before: Call | None = None
    for number, call in enumerate(calls):
        if not _fits((call,), args):
            break
        kept = {i: text for i, text in places.items() if i < len(call.ids) and call.ids[i] == first[i]}
        agents = []
        for n, spawn in enumerate(call.spawned):
            label, own = f"{name}/agent-{number}.{n}", spawn.calls[0].ids
            some = _shared_tokens(spawn.shared_tokens, args) // block
            begin = {i: f"shared-agent:{i}" for i in range(min(some, len(own)))}
            inner = _steps(spawn.calls, label, scope, begin, own, block, args)
            if inner:
                agents.append(Agent(_delay(spawn.delay, args), Session(label, inner), spawn.joined))
        pieces = Blocks(scope, call.ids, block, args.scale, kept, _tail(call, f"{name}/tail-{number}", block, args))
        out = max(1, round(call.output_tokens * args.scale))
        out = min(out, args.max_output) if args.max_output else out
        group = "first turn" if before is None else "later turn"
        steps.append(Step(pieces, out, group, think=_think(before, call, args), agents=tuple(agents)))
        before = call
    return tuple(steps)


def _tail(call: Call, name: str, block: int, args: argparse.Namespace) -> tuple[Piece, ...]:
    """What comes after the last whole block, and always something, so that no two prompts are the same."""
    covered = round(len(call.ids) * block * args.scale)
    return (Piece(name, max(1, round(call.prompt_tokens * args.scale) - covered)),)


def _think(before: Call | None, call: Call, args: argparse.Namespace) -> float:
    if before is None:
        return 0.0
    joined = [spawn.ended for spawn in before.spawned if spawn.joined]
    if joined:  # the recorded think time contains the waiting for them
        return _delay(call.at - max(joined), args)
    return _delay(call.think if call.think is not None else call.at - before.at - before.took, args)


def _delay(seconds: float, args: argparse.Namespace) -> float:
    return min(args.max_delay, max(0.0, seconds) * args.time_scale)


def _shared_tokens(tokens: int, args: argparse.Namespace) -> int:
    return int(tokens * args.warm_prefix_pct)


def _fits(calls: tuple[Call, ...], args: argparse.Namespace) -> bool:
    def total(call: Call) -> int:
        out = round(call.output_tokens * args.scale)
        return round(call.prompt_tokens * args.scale) + (min(out, args.max_output) if args.max_output else out)

    return bool(calls) and (not args.max_context or all(total(call) <= args.max_context for call in calls))


def _timed(trace: Trace, args: argparse.Namespace) -> Session:
    """One request of a timed trace. Its ids mean the same in every request."""
    call = trace.calls[0]
    tokens = max(1, round(call.prompt_tokens * args.scale))
    whole = min(len(call.ids), call.prompt_tokens // trace.block_tokens)
    covered = round(whole * trace.block_tokens * args.scale)
    rest = call.ids[whole] if whole < len(call.ids) else f"{trace.name}/tail"
    tail = (Piece(f"trace:{rest}", tokens - covered),) if tokens > covered else ()
    pieces = Blocks("trace", call.ids[:whole], trace.block_tokens, args.scale, {}, tail)
    out = max(1, round(call.output_tokens * args.scale))
    out = min(out, args.max_output) if args.max_output else out
    return Session(trace.name, (Step(pieces, out),), (trace.start or 0.0) * args.time_scale)

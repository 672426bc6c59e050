"""Several workloads against the same arms, all of them up: round after round while there is time, every round written as it ends.

Starting an engine takes as long as a turn or longer, so what is measured together is started once. A round asks every arm;
each workload goes round once before the first goes round again, so that a short day still shows something of everything.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pdserve.bench import arms, cli, compare, one, results, runner, variants
from pdserve.bench.regimes import judge, sweep
from pdserve.bench.results import Result, Run
from pdserve.errors import PdserveError

SHOWN = ("TTFT mean", "output tok/s", "requests within the target")
CLIENT_BOUND_MS = 10.0  # as --max-client-overhead
BEFORE = "The client ran before the engines where they shared a core (nice -10), so that its clock was not late."
HOW = "All arms were up, idle while it was not their turn."


@dataclass(frozen=True)
class Load:
    """One workload as `pdserve bench` takes it. `seconds`: what one turn of one arm takes at most, for the first round's plan.
    `arms`: only these of those that are up. `since`: the first round that it takes part in; what may be left out comes late."""

    name: str
    words: str
    seconds: float
    rounds: int = 3
    arms: tuple[str, ...] = ()
    since: int = 1

    def takes_part(self, turn: int) -> bool:
        return self.since <= turn < self.since + self.rounds


def _kind(args: argparse.Namespace) -> ModuleType:
    """Who knows how to send a load's words: a workload, or a sweep over the points of `regimes`."""
    return sweep if args.word == "regimes" else one


class TimeUp(KeyboardInterrupt):
    """The time is spent in the middle of a turn; a KeyboardInterrupt, so that no event loop keeps it to itself."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[Callable[[], None]]:
    """Raises TimeUp in the main thread after so long, unless what is yielded was called before; and when asked to end (SIGTERM)."""

    def ring(number: int, frame: object) -> None:
        raise TimeUp

    def off() -> None:
        signal.alarm(0)

    before = {number: signal.signal(number, ring) for number in (signal.SIGALRM, signal.SIGTERM)}
    signal.alarm(max(1, int(seconds)))
    try:
        yield off
    finally:
        off()
        for number, handler in before.items():
            signal.signal(number, handler)


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """The words as `pdserve bench` reads them."""
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(words)


def run(
    loads: Sequence[Load],
    todo: dict[str, argparse.Namespace],
    seconds: float,
    stop_seconds: float,
    say: Callable[[str], None],
    about: Sequence[str] = (),
) -> str:
    """`todo`: each load's words, parsed; all name the same arms, topology and folder. `about`: what a reader of every result must
    know. How it ended, in words."""
    until = time.monotonic() + seconds - stop_seconds
    first = todo[loads[0].name]
    base = arms.read_base(first.topology)
    names, notes = arms.usable(variants.parse(first.arms), base)
    notes = [*notes, *about, *arms.remarks(names, base), HOW]
    try:
        with (
            limited(seconds - stop_seconds) as off,
            tempfile.TemporaryDirectory(prefix="pdserve-suite-") as folder,
            arms.up(names, base, Path(folder), first) as (up, problems),
        ):
            say(f"up with {until - time.monotonic():.0f} s left: {', '.join(up)}")
            with _before_engines() as more:
                _Rounds(loads, todo, up, [*notes, *problems, *more], say).go(until)
            off()  # stopping has a time of its own
    except TimeUp:
        return "time was up in the middle of a round, which is left out"
    return "to its end"


@contextlib.contextmanager
def _before_engines() -> Iterator[list[str]]:
    """This process goes before those that it has started, and what a reader must know of that. One that may not stays as it is,
    and its lateness is told."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    try:
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    except PermissionError:
        yield []
        return
    try:
        yield [BEFORE]
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


class _Rounds:
    def __init__(
        self,
        loads: Sequence[Load],
        todo: dict[str, argparse.Namespace],
        up: arms.Up,
        notes: list[str],
        say: Callable[[str], None],
    ) -> None:
        self._loads, self._todo, self._up, self._say = loads, todo, up, say
        server = next(iter(up.values()))[0]
        self._found: dict[str, Result] = {name: _kind(args).begin(args, server) for name, args in todo.items()}
        most = max(_kind(args).most_users(args, server) for args in todo.values())
        overhead = runner.overhead(most, float("inf"))  # told, never refused: what is up costs more than it
        for result in self._found.values():
            result.notes += notes
            result.overhead = overhead
        self._notes = {name: list(result.notes) for name, result in self._found.items()}
        self._took = {load.name: load.seconds * len(self._arms(load)) for load in loads}

    def go(self, until: float) -> None:
        for turn in range(1, max(load.since + load.rounds for load in self._loads)):
            for load in (one_load for one_load in self._loads if one_load.takes_part(turn)):
                left, took = until - time.monotonic(), self._took[load.name]
                if left < 1.1 * took:
                    self._say(f"left out: {load.name}, round {turn}: it would take {took:.0f} s, {left:.0f} s are left")
                    continue
                began = time.monotonic()
                self._round(load, turn)
                self._took[load.name] = time.monotonic() - began
                self._write(load.name)
                self._show(self._found[load.name])

    def _arms(self, load: Load) -> list[str]:
        return [name for name in self._up if not load.arms or name in load.arms]

    def _round(self, load: Load, turn: int) -> None:
        """Every other one goes the other way, so that no arm is always the first."""
        result = self._found[load.name]
        names = self._arms(load)
        for arm in names if turn % 2 else names[::-1]:
            server, raw = self._up[arm]
            args = self._todo[load.name]
            try:
                run: Run = _kind(args).measure(args, server, result, arm, turn, {"topology": raw})
            except PdserveError as error:
                self._notes[load.name].append(f"{arm} failed in round {turn} and was left out from then on: {error}")
                self._say(self._notes[load.name][-1])
                del self._up[arm]
                continue
            late = f"client late by {run.lag_p99_ms:.1f} ms"
            self._say(f"{load.name} {turn} {arm}: {run.seconds:.1f} s, {len(result.of(arm, turn))} requests, {late}")

    def _write(self, name: str) -> None:
        """With what there is to say of the client in all rounds so far."""
        result = self._found[name]
        late = one.too_late(result, CLIENT_BOUND_MS)
        for sentence in late:
            self._say("   " + sentence)
        result.notes = [*self._notes[name], *compare.idle_caches(result), *late]
        results.write(result, self._todo[name].out, name)

    def _show(self, result: Result) -> None:
        """The verdicts so far; whatever ends this early loses nothing that was said."""
        if (adaptive := judge.adaptive_of(result.arms)) and result.workload == "regimes":
            for sentence in judge.sentences(result, adaptive, judge.judge(result, adaptive)):
                self._say("   " + sentence)
            return
        for verdict in compare.verdicts(result, compare.focus(result)):
            if verdict.metric in SHOWN:
                self._say("   " + verdict.sentence)

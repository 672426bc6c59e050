"""Conversations, queues, tiers and instances in simulated time. Pure and deterministic.

An instance computes one prompt at a time, in order of arrival; loads go on beside that. A conversation stays with its
instance. The own cache of an instance and the tiers, which all instances share, evict as pdserve's do (transfer/eviction).
Left out: batching of prompts, and what prefills cost the answers that are written beside them; docs/benchmarks.md states how
far off a real run was.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pdserve.bench.size.speeds import Speeds
from pdserve.bench.size.work import Talk, Turn, Work
from pdserve.transfer.eviction import POLICIES

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated. `tiers`: (name, tokens) from the fastest down; `users` 0: as the plan says."""

    instances: int
    tiers: tuple[tuple[str, int], ...]
    kv_bytes: int
    users: int = 0
    seqs: int = 64  # answers that one consumer writes at a time
    duration: float = 0.0  # simulated seconds of a measured stage, 0: to its end
    policy: str = "lru"
    gpu_tokens: int | None = None  # None: as measured


@dataclass(slots=True)
class Simulated:
    """Sums over the measured requests. Seconds and tokens."""

    requests: int = 0
    prompt: int = 0
    output: int = 0
    hits: dict[str, int] = field(default_factory=dict)
    ttfts: list[float] = field(default_factory=list)
    groups: dict[str, list[float]] = field(default_factory=dict)
    busy: float = 0.0  # computing prompts, all instances together
    writing: float = 0.0  # seconds x answers
    seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        return sum(self.hits.values()) / self.prompt if self.prompt else 0.0

    def ttft(self, q: float) -> float:
        ordered = sorted(self.ttfts)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


class _Store:
    """Chunks that one cache holds, with pdserve's own eviction."""

    def __init__(self, capacity: int, policy: str, parents: Sequence[int]) -> None:
        self.capacity, self._parents = capacity, parents
        self._policy = POLICIES[policy]()
        self._held: set[int] = set()

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._held

    def remember(self, chunks: Sequence[int]) -> None:
        """Uses what is there, the last of a prefix first, and takes in what is not."""
        for chunk in reversed(chunks):
            if chunk in self._held:
                self._policy.touch(_key(chunk))
        for chunk in chunks:
            if chunk not in self._held and not self._put(chunk):
                return

    def _put(self, chunk: int) -> bool:
        """False when there is no room that is not the chunk's own parent."""
        parent = self._parents[chunk]
        if self.capacity < 1 or (parent >= 0 and parent not in self._held):
            return False
        while len(self._held) >= self.capacity:
            victim = self._policy.victim()
            if victim is None or victim == _key(parent):
                return False
            self._policy.remove(victim)
            self._held.discard(int.from_bytes(victim, "big"))
        self._held.add(chunk)
        self._policy.add(_key(chunk), _key(parent) if parent >= 0 else b"")
        return True


def _key(chunk: int) -> bytes:
    return chunk.to_bytes(8, "big") if chunk >= 0 else b""


class Simulation:
    def __init__(self, work: Work, speeds: Speeds, setup: Setup) -> None:
        self._work, self._speeds, self._setup = work, speeds, setup
        own = speeds.gpu_tokens if setup.gpu_tokens is None else setup.gpu_tokens
        self._own = [_Store(own // work.chunk_tokens, "lru", work.parents) for _ in range(setup.instances)]
        self._tiers = [(n, _Store(size // work.chunk_tokens, setup.policy, work.parents)) for n, size in setup.tiers]
        self._free = [0.0] * setup.instances
        self._talks = [0] * setup.instances
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = 0
        self.found = Simulated()

    def run(self) -> Simulated:
        clock = 0.0
        for measured, given, users, talks in self._work.stages:
            begin = clock
            last = begin + self._setup.duration if measured and self._setup.duration else float("inf")
            if given:
                for talk in talks:
                    self._at(begin + (talk.start or 0.0), self._player(talk, measured, last))
            else:
                waiting = iter(talks)
                for _ in range((self._setup.users if measured else 0) or users):
                    self._at(begin, self._user(waiting, measured, last))
            clock = self._drain(begin)
            if measured:
                self.found.seconds += clock - begin
        return self.found

    def _player(self, talk: Talk, measured: bool, last: float) -> Callable[[float], None]:
        return lambda now: self._talk(talk, now, measured, last, lambda end: None)

    def _user(self, waiting: Iterator[Talk], measured: bool, last: float) -> Callable[[float], None]:
        """Takes conversations one after another."""

        def take(now: float) -> None:
            talk = next(waiting, None) if now < last else None
            if talk is not None:
                self._talk(talk, now, measured, last, take)

        return take

    def _at(self, when: float, what: Callable[[float], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, what))

    def _drain(self, clock: float) -> float:
        while self._events:
            clock, _, what = heapq.heappop(self._events)
            what(clock)
        return clock

    def _talk(self, talk: Talk, now: float, measured: bool, last: float, ended: Callable[[float], None]) -> None:
        """Plays a conversation from its first turn; `ended` is called when it is over."""
        place = min(range(len(self._talks)), key=self._talks.__getitem__)
        self._talks[place] += 1
        begin = now

        def play(number: int, ready: float) -> None:
            if number >= len(talk.turns):
                return over(ready)
            turn = talk.turns[number]
            intended = begin + turn.at if turn.at is not None else ready + turn.think
            if intended > last:
                return over(ready)
            self._at(
                max(intended, ready),
                lambda at: answered(number, turn, self._request(turn, place, at, intended, measured)),
            )

        def answered(number: int, turn: Turn, end: float) -> None:
            joined = [a for a in turn.agents if a[1]]
            left = [len(joined)]

            def back(at: float) -> None:
                left[0] -= 1
                if not left[0]:
                    play(number + 1, max(end, at))

            for delay, joins, inner in turn.agents:
                done = back if joins else (lambda at: None)
                self._at(end + delay, lambda at, inner=inner, done=done: self._talk(inner, at, measured, last, done))  # type: ignore[misc]
            if not joined:
                self._at(end, lambda at: play(number + 1, at))

        def over(at: float) -> None:
            self._talks[place] -= 1
            ended(at)

        play(0, now)

    def _request(self, turn: Turn, place: int, now: float, intended: float, measured: bool) -> float:
        """One request at `now`; when its answer ends."""
        speeds, size = self._speeds, self._work.chunk_tokens
        own = self._own[place]
        known = _run(turn, 0, lambda chunk: chunk in own)
        hits = {"gpu": known * size} if known else {}
        loading = 0.0
        for name, store in self._tiers:
            more = _run(turn, known, lambda chunk, store=store: chunk in store)  # type: ignore[misc]
            if more and name in speeds.tiers:
                spent = speeds.load(name, more * size, self._setup.kv_bytes)
                if spent < speeds.compute(known * size, (known + more) * size):  # break-even, as the connector decides
                    hits[name] = more * size
                    loading += spent
                    known += more
        computing = speeds.base + speeds.compute(min(known * size, turn.tokens - 1), turn.tokens)
        start = max(now + loading, self._free[place])
        first = self._free[place] = start + computing
        end = first + (turn.output - 1) * speeds.token
        for store in (own, *(store for _, store in self._tiers)):
            store.remember(turn.chunks)
        if measured:
            self._note(turn, hits, first - intended, computing, end - first)
        return end

    def _note(self, turn: Turn, hits: dict[str, int], ttft: float, computing: float, writing: float) -> None:
        found = self.found
        found.requests += 1
        found.prompt += turn.tokens
        found.output += turn.output
        for name, tokens in hits.items():
            found.hits[name] = found.hits.get(name, 0) + tokens
        found.ttfts.append(ttft)
        found.groups.setdefault(turn.group, []).append(ttft)
        found.busy += computing
        found.writing += writing


def _run(turn: Turn, start: int, there: Callable[[int], bool]) -> int:
    """How many chunks in a row from `start` on are there."""
    count = 0
    for i in range(start, len(turn.chunks)):
        if not there(turn.chunks[i]):
            break
        count += 1
    return count


def simulate(work: Work, speeds: Speeds, setup: Setup) -> Simulated:
    return Simulation(work, speeds, setup).run()

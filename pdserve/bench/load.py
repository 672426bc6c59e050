"""Sends a plan and notes what happened. Latency counts from the intended start, whatever kept the request from being sent then.

closed   as many users as told, each taking the next session when its own has ended
open     sessions come in by a Poisson process (--rate) or when the workload says (its stage is `given`), whatever is unanswered
ramp     closed, with the number of users set again every period (ramp.py)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pdserve.bench.client import Broken, Reply, StreamClient
from pdserve.bench.plan import Agent, Piece, Plan, Session, Stage, Step
from pdserve.bench.ramp import Ramp
from pdserve.bench.record import Record
from pdserve.bench.text import Writer
from pdserve.errors import PdserveError

HOPELESS = 10  # so many requests failed from the start on, and none worked: the run is given up
FAILURE_PAUSE = 0.2  # before a user goes on after a failure, so that a refusing server is not hammered
LAG_EVERY = 0.05
FINISH_GRACE = 5.0


class HopelessError(PdserveError):
    """Nothing works; the message has the first failure's own words."""


@dataclass(frozen=True, slots=True)
class Options:
    model: str
    seed: int = 0
    chat: bool = False
    timeout: float = 300.0
    rate: float = 0.0  # sessions a second; 0: closed loop
    concurrency: int = 0  # 0: as the stage says
    duration: float = 0.0  # seconds of a measured stage after which nothing new is begun; 0: until the plan ends
    warmup: float = 0.0  # seconds at a measured stage's begin that are kept out of the figures
    settle: float = 0.0  # seconds between two stages
    ignore_eos: bool = True
    max_inflight: int = 4096
    extra: dict[str, Any] = field(default_factory=dict)  # into every body


@dataclass(slots=True)
class Outcome:
    """Everything a run left behind. `lag_ms` are how late the client's own loop was, sampled all the time."""

    records: list[Record] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    lag_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    ramp: Ramp | None = None


class Load:
    """One run of one plan against one server. `on_record` hears of every request's end."""

    def __init__(
        self,
        plan: Plan,
        client: StreamClient,
        writer: Writer,
        options: Options,
        *,
        ramp: Ramp | None = None,
        on_record: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self._plan, self._client, self._writer, self._options = plan, client, writer, options
        self._on_record = on_record
        self._path = "/v1/chat/completions" if options.chat else "/v1/completions"
        self._slots = asyncio.Semaphore(options.max_inflight)
        self._users, self._failed_first = 0, 0
        self._any_ok = False
        self._first_error = ""
        self._window: deque[float] = deque(maxlen=100_000)
        self._begin = 0.0
        self._last = float("inf")
        self._warm_until = 0.0
        self.in_flight = 0
        self.outcome = Outcome(ramp=ramp)

    async def run(self) -> Outcome:
        began = self._begin = time.perf_counter()
        lag = asyncio.create_task(self._watch_lag())
        try:
            for number, stage in enumerate(self._plan.stages):
                if number and self._options.settle:
                    await asyncio.sleep(self._options.settle)
                await self._stage(stage)
        finally:
            lag.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await lag
        self.outcome.seconds = time.perf_counter() - began
        return self.outcome

    # ---- stages ----

    async def _stage(self, stage: Stage) -> None:
        begin = self._now()
        limited = stage.measured and self._options.duration > 0
        if stage.endless and not limited:
            raise PdserveError(f"{stage.name} has no end of its own: give --duration")
        self._last = begin + self._options.duration if limited else float("inf")
        self._warm_until = begin + self._options.warmup if stage.measured else begin
        sessions = iter(stage.sessions)
        async with asyncio.TaskGroup() as group:
            if stage.given:
                await self._arrive(group, stage, ((s.start or 0.0, s) for s in sessions), begin)
            elif stage.measured and self._options.rate:
                await self._arrive(group, stage, self._poisson(sessions, stage.name), begin)
            elif stage.measured and self.outcome.ramp is not None:
                await self._ramp(group, stage, sessions, self.outcome.ramp)
            else:
                users = (self._options.concurrency if stage.measured else 0) or stage.concurrency
                for _ in range(users):
                    group.create_task(self._user(stage, sessions))
        self.outcome.stages.append({"name": stage.name, "measured": stage.measured, "begin": begin, "end": self._now()})

    def _poisson(self, sessions: Iterator[Session], name: str) -> Iterator[tuple[float, Session]]:
        rng, at = random.Random(f"{self._options.seed}/{name}"), 0.0
        for session in sessions:
            at += rng.expovariate(self._options.rate)
            yield at, session

    async def _arrive(
        self, group: asyncio.TaskGroup, stage: Stage, timed: Iterator[tuple[float, Session]], begin: float
    ) -> None:
        for at, session in timed:
            if begin + at > self._last:
                return
            await self._until(begin + at)
            group.create_task(self._session(stage, session, begin + at))

    async def _user(self, stage: Stage, sessions: Iterator[Session], number: int = -1) -> None:
        """Takes sessions until there are none, time is up, or (in a ramp) it is one user too many."""
        while self._now() < self._last and not (number >= 0 and number >= self._users):
            session = next(sessions, None)
            if session is None:
                return
            ok = await self._session(stage, session, self._now(), number)
            if not ok:
                await asyncio.sleep(FAILURE_PAUSE)

    async def _ramp(self, group: asyncio.TaskGroup, stage: Stage, sessions: Iterator[Session], ramp: Ramp) -> None:
        self._users = ramp.start
        running: dict[int, asyncio.Task[None]] = {}
        while self._now() < self._last:
            for number in range(self._users):
                if number not in running or running[number].done():
                    running[number] = group.create_task(self._user(stage, sessions, number))
            if all(task.done() for task in running.values()):
                return
            begin, users = self._now(), self._users
            self._window.clear()
            await asyncio.sleep(min(ramp.period, max(0.0, self._last - begin)))
            self._users = ramp.next_users(begin, users, list(self._window))
        self._users = 0

    # ---- sessions and requests ----

    async def _session(self, stage: Stage, session: Session, begin: float, user: int = -1) -> bool:
        """All steps, each at its time. False if one failed."""
        answers: dict[int, str] = {}
        ready, all_ok = begin, True
        left_alone: list[asyncio.Task[float]] = []
        try:
            for number, step in enumerate(session.steps):
                intended = begin + step.at if step.at is not None else ready + step.think
                if intended > self._last or (user >= 0 and user >= self._users and number):
                    break
                body = self._body(step, session, answers)
                await self._until(intended)
                record = await self._request(stage, session, number, step, body, intended, answers)
                all_ok &= record.ok
                ready = self._now()
                waited: list[asyncio.Task[float]] = []
                for agent in step.agents:
                    task = asyncio.ensure_future(self._agent(stage, agent, ready))
                    (waited if agent.joined else left_alone).append(task)
                if waited:
                    ready = max(ready, *await asyncio.gather(*waited))
            await asyncio.gather(*left_alone)
        finally:
            for task in left_alone:
                task.cancel()
        return all_ok

    async def _agent(self, stage: Stage, agent: Agent, ready: float) -> float:
        """A sub-agent's conversation; when it ended."""
        if ready + agent.delay <= self._last:
            await self._until(ready + agent.delay)
            await self._session(stage, agent.session, ready + agent.delay)
        return self._now()

    async def _request(
        self,
        stage: Stage,
        session: Session,
        number: int,
        step: Step,
        body: bytes,
        intended: float,
        answers: dict[int, str],
    ) -> Record:
        options = self._options
        phase = "fill" if not stage.measured else ("warmup" if intended < self._warm_until else "measured")
        record = Record(
            stage=stage.name, group=step.group, session=session.name, step=number, phase=phase,
            intended=intended, planned_tokens=step.prompt_tokens,
        )  # fmt: skip
        async with self._slots:
            record.sent = self._now()
            self.in_flight += 1
            try:
                reply = await self._client.stream(self._path, body, options.timeout)
                _note(record, reply, self._begin)
                answers[number] = "".join(reply.text)
            except TimeoutError:
                record.status, record.error = "timeout", f"not ended after {options.timeout:g} s"
            except Broken as broken:
                record.status, record.error = "error", str(broken)
            finally:
                self.in_flight -= 1
        record.ended = record.ended or self._now()
        self._end(record)
        return record

    def _end(self, record: Record) -> None:
        if record.phase == "measured":
            self._window.append((record.ttft_ms or 0.0) / 1000 if record.ok else self._options.timeout)
        self._any_ok |= record.ok
        if not self._any_ok:
            self._failed_first += 1
            self._first_error = self._first_error or record.error
            if self._failed_first >= HOPELESS:
                raise HopelessError(f"the first {HOPELESS} requests failed: {self._first_error}")
        self.outcome.records.append(record)
        self._on_record(record)

    def _body(self, step: Step, session: Session, answers: dict[int, str]) -> bytes:
        options = self._options
        body: dict[str, Any] = {
            "model": options.model,
            "max_tokens": step.output_tokens,
            "temperature": 0,
            "stream": True,
        }
        body["stream_options"] = {"include_usage": True}
        if options.ignore_eos:
            body["ignore_eos"] = True
        body |= options.extra
        if options.chat:
            body["messages"] = messages(step, self._writer, answers)
        else:
            body["prompt"] = "".join(_said(piece, self._writer, answers) for piece in step.pieces)
        return msgspec.json.encode(body)

    # ---- time ----

    def _now(self) -> float:
        return time.perf_counter() - self._begin

    async def _until(self, at: float) -> None:
        while (left := at - self._now()) > 0:  # noqa: ASYNC110 - a time, not an event
            await asyncio.sleep(left)

    async def _watch_lag(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(LAG_EVERY)
            self.outcome.lag_ms.append((time.perf_counter() - before - LAG_EVERY) * 1000)


def _said(piece: Piece, writer: Writer, answers: dict[int, str]) -> str:
    if piece.answer_of >= 0 and (answer := answers.get(piece.answer_of)):
        return answer
    return piece.text or writer.block(piece.name, piece.tokens)


def messages(step: Step, writer: Writer, answers: dict[int, str]) -> list[dict[str, str]]:
    """The pieces as a chat: neighbours of one role are one message."""
    found: list[dict[str, str]] = []
    for piece in step.pieces:
        text = _said(piece, writer, answers)
        if found and found[-1]["role"] == piece.role:
            found[-1]["content"] += text
        else:
            found.append({"role": piece.role, "content": text.strip()})
    if found[-1]["role"] == "system":
        found[-1]["role"] = "user"  # a chat template wants somebody to answer
    return found


def _note(record: Record, reply: Reply, begin: float) -> None:
    times = reply.tokens_at
    record.ended = reply.ended - begin
    record.first = (times[0] if times else reply.ended) - begin
    record.ttft_ms = (record.first - record.intended) * 1000
    record.latency_ms = (record.ended - record.intended) * 1000
    record.itl_ms = [round((b - a) * 1000, 3) for a, b in itertools.pairwise(times)]
    record.prompt_tokens, record.cached_tokens = reply.prompt_tokens, reply.cached_tokens
    record.output_tokens = reply.output_tokens or len(times)
    headers = reply.headers
    record.route, record.reason = headers.get("x-pdserve-route", ""), headers.get("x-pdserve-reason", "")
    record.load_reason = headers.get("x-pdserve-load-reason", "")
    record.request_id = headers.get("x-request-id", "") or reply.id
    for name in ("load_ms", "saved_ms"):
        value = headers.get(f"x-pdserve-{name.replace('_', '-')}", "")
        with contextlib.suppress(ValueError):
            setattr(record, name, float(value) if value else None)
    record.tiers = _tiers(headers.get("x-pdserve-cached-tokens", ""))


def _tiers(text: str) -> dict[str, int]:
    """ "dram=512, disk=256" -> {"dram": 512, "disk": 256}; anything else is nothing."""
    found = {}
    for word in text.split(","):
        name, _, count = word.partition("=")
        if count.strip().isdigit():
            found[name.strip()] = int(count)
    return found

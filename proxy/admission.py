"""Who may start now, who waits, and who is told to come back later: the line before the engines.

Two limits follow what is measured; both grow by one for every full round that went well, and shrink by a fifth, at most
once per target, when a target is missed:

    first token    how many requests may be between arrival and first token at once
    between tokens how many may be running at all; without a limit until some class's target was missed

Waiting is in order of priority, then deadline within a tenant; in between tenants the one goes first that has been given
least, by its weight. A request that cannot have its first token in time, by the line before it and by what prompts of
its size took lately, or finds the line full, is refused at once with the time after which to try again.

A request whose class (slo.py) has no target passes, and nothing is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from pdserve.errors import RequestError
from pdserve.proxy.keys import Key
from pdserve.proxy.pace import Pace
from pdserve.proxy.slo import Classes, SloClass

SMALLER, START, MOST = 0.8, 8.0, 4096.0
WAIT_SHARE = 0.5  # of the target for the first token that a request may wait for
PATIENCE = 5.0  # seconds of waiting where there is no such target
GAPS = 32  # gaps between tokens that are judged together


class Refused(RequestError):
    """The line is too long. `retry_after` in whole seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(429, message, "rate_limit_error", code="slo_cannot_be_met")
        self.retry_after = max(1, math.ceil(retry_after))


@dataclass(slots=True)
class Tenant:
    """What one key has been given, and who waits in its name: (priority, deadline, order, future)."""

    key: Key
    given: float = 0.0
    line: list[tuple[int, float, int, asyncio.Future[None]]] = field(default_factory=list)


class Limit:
    """How many at once: additive increase, multiplicative decrease."""

    def __init__(self, most: float) -> None:
        self.most = most
        self.inside = 0
        self._lowered = -math.inf

    @property
    def full(self) -> bool:
        return self.inside >= int(self.most)

    def judged(self, missed: bool, target: float, now: float) -> None:
        if not missed:
            if self.full:
                self.most = min(MOST, self.most + 1 / self.most)
        elif now - self._lowered >= target:
            self.most, self._lowered = max(1.0, SMALLER * min(self.most, max(self.inside, 1))), now


class Pass:
    """Leave to start; `first_token` gives the first place free, the end of the `async with` all of it."""

    __slots__ = ("_admission", "_began", "_gaps", "_open", "_size", "_sum", "slo")

    def __init__(self, admission: Admission, began: float, slo: SloClass, size: int) -> None:
        self._admission, self._began, self.slo, self._size, self._open = admission, began, slo, size, True
        self._gaps, self._sum = 0, 0.0

    def first_token(self) -> None:
        """The first token is there, or it never will be."""
        if self._open:
            self._open = False
            self._admission.answered(self._began, self.slo, self._size)

    def gap(self, seconds: float) -> None:
        """The time between two arrivals of tokens."""
        self._gaps += 1
        self._sum += seconds
        if self._gaps >= GAPS:
            self._admission.paced(self._sum / self._gaps, self.slo)
            self._gaps, self._sum = 0, 0.0

    def drop(self) -> None:
        if self._open:
            self._open = False
            self._admission.first.inside -= 1
        self._admission.running.inside -= 1
        self._admission.let_in()


class Admission:
    def __init__(self, classes: Classes | None = None, line_limit: int = 256, counted: Any = None) -> None:
        """`counted` is the metric slo_total."""
        self.classes = classes or Classes()
        self._line_limit, self._counted = line_limit, counted
        self.first, self.running = Limit(START), Limit(MOST)
        self.waiting = 0
        self.gates = False  # some request has had a target
        self._tenants: dict[str, Tenant] = {}
        self._order = itertools.count()
        self.pace = Pace()
        self._virtual = 0.0

    def predicted(self, ahead: int, size: int) -> float:
        """Seconds until a request of this size with so many before it has its first token, by what was measured."""
        return self.pace.mean * ahead / max(1.0, self.first.most) + self.pace.seconds(size)

    @contextlib.asynccontextmanager
    async def entered(self, key: Key, slo: SloClass, size: int, priority: int = 0) -> AsyncIterator[Pass]:
        """Waits for leave. Raises Refused. `size` is the prompt's, in bytes."""
        self.gates = True
        loop = asyncio.get_running_loop()
        began = loop.time()
        if self.first.full or self.running.full or self.waiting:
            await self._wait(key, slo, size, priority + key.priority + slo.priority, began)
        else:
            self._account(self._tenant(key))
            self._take()
        leave = Pass(self, loop.time(), slo, size)
        try:
            yield leave
        finally:
            leave.drop()

    async def _wait(self, key: Key, slo: SloClass, size: int, priority: int, began: float) -> None:
        expected = self.predicted(self.waiting + 1, size)
        if self.waiting >= self._line_limit or (slo.ttft and expected > slo.ttft):
            self._count(slo, "ttft", "refused")
            raise Refused("The first token would come too late for its target; try again later.", expected)
        tenant, future = self._tenant(key), asyncio.get_running_loop().create_future()
        deadline = began + (WAIT_SHARE * slo.ttft or PATIENCE)
        place = (priority, deadline, next(self._order), future)
        heapq.heappush(tenant.line, place)
        self.waiting += 1
        try:
            async with asyncio.timeout_at(deadline):
                await future
        except BaseException as exc:
            if future.done() and not future.cancelled():
                self.first.inside -= 1  # leave was given in the very moment of leaving
                self.running.inside -= 1
                self.let_in()
            else:
                # Taken out at once: behind others of a better priority it might never come to the front, where those are dropped.
                if place in tenant.line:
                    tenant.line.remove(place)
                    heapq.heapify(tenant.line)
                self.waiting -= 1
            if isinstance(exc, TimeoutError):
                self._count(slo, "ttft", "refused")
                wait = self.predicted(self.waiting, size)
                raise Refused("No place became free in time; try again later.", wait) from exc
            raise

    def _tenant(self, key: Key) -> Tenant:
        found = self._tenants.get(key.name)
        if found is None:
            found = self._tenants[key.name] = Tenant(key, self._virtual)
        return found

    def _account(self, tenant: Tenant) -> None:
        """One more for this tenant. One that was away does not come back with a claim on the past."""
        tenant.given = max(tenant.given, self._virtual) + 1 / tenant.key.weight

    def answered(self, began: float, slo: SloClass, size: int) -> None:
        """A first token came, for leave given at `began`."""
        now = asyncio.get_running_loop().time()
        took = now - began
        self.pace.add(size, took)
        if slo.ttft:
            self.first.judged(took > slo.ttft, slo.ttft, now)
            self._count(slo, "ttft", "missed" if took > slo.ttft else "met")
        self.first.inside -= 1
        self.let_in()

    def paced(self, gap: float, slo: SloClass) -> None:
        """A stream of that class has lately had a token every `gap` seconds."""
        if slo.itl:
            self.running.judged(gap > slo.itl, GAPS * slo.itl, asyncio.get_running_loop().time())
            self._count(slo, "itl", "missed" if gap > slo.itl else "met")
            self.let_in()

    def let_in(self) -> None:
        while not (self.first.full or self.running.full) and (future := self._next()) is not None:
            self._take()
            future.set_result(None)

    def _take(self) -> None:
        self.first.inside += 1
        self.running.inside += 1

    def _count(self, slo: SloClass, target: str, outcome: str) -> None:
        if self._counted is not None:
            self._counted.labels(slo.name, target, outcome).inc()

    def _next(self) -> asyncio.Future[None] | None:
        """The next in line: the best priority, then the tenant that has had least, then the earliest deadline."""
        for tenant in self._tenants.values():
            while tenant.line and tenant.line[0][3].done():  # given up, but not gone yet
                heapq.heappop(tenant.line)
        waiting = [tenant for tenant in self._tenants.values() if tenant.line]
        if not waiting:
            return None
        tenant = min(waiting, key=lambda t: (t.line[0][0], t.given))
        self._virtual = max(self._virtual, tenant.given)
        self._account(tenant)
        self.waiting -= 1
        return heapq.heappop(tenant.line)[3]

"""Who may start now, who waits, and who is told to come back later: the line before the prefills.

The gate lets `limit` requests be between arrival and first token at once. The limit follows what is measured: a first
token later than its target makes it smaller (by a fifth, at most once per target), one in time while the gate is full
makes it larger (by one for every `limit` of them). Waiting is in order of priority, then deadline within a tenant; in
between tenants the one goes first that has been given least, by its weight. A request that cannot have its first token
in time by what is known, or finds the line full, is refused at once with the time after which to try again.

Without a target there is no gate: everything passes, and nothing is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from pdserve.errors import RequestError
from pdserve.proxy.keys import Key

SMALLER, START, MOST = 0.8, 8.0, 4096.0


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


class Pass:
    """Leave to start; `first_token` gives the place at the gate free."""

    __slots__ = ("_admission", "_began", "_open", "_target")

    def __init__(self, admission: Admission, began: float, target: float) -> None:
        self._admission, self._began, self._target, self._open = admission, began, target, True

    def first_token(self) -> None:
        """The first token is there, or it never will be."""
        if self._open:
            self._open = False
            self._admission.left(self._began, self._target)

    def drop(self) -> None:
        if self._open:
            self._open = False
            self._admission.free()


class Admission:
    def __init__(self, target: float = 0.0, line_limit: int = 256, wait_share: float = 0.5) -> None:
        """`target` in seconds from arrival to first token; a request waits for `wait_share` of it at the most."""
        self._target, self._line_limit, self._wait_share = target, line_limit, wait_share
        self.limit = START
        self.inside = 0
        self.waiting = 0
        self._tenants: dict[str, Tenant] = {}
        self._order = itertools.count()
        self._turned_down = 0.0
        self._time = 0.0  # from the gate to the first token, smoothed
        self._virtual = 0.0
        self.gates = False  # some request has had a target

    def predicted(self, ahead: int) -> float:
        """Seconds until a request with so many before it has its first token, by what was measured."""
        return self._time * (1 + ahead / max(1.0, self.limit))

    def gated(self, key: Key) -> bool:
        gated = bool(key.ttft or self._target)
        self.gates = self.gates or gated
        return gated

    @contextlib.asynccontextmanager
    async def entered(self, key: Key, priority: int) -> AsyncIterator[Pass]:
        """Waits for leave. Raises Refused."""
        target = key.ttft or self._target
        loop = asyncio.get_running_loop()
        began = loop.time()
        if self.inside >= int(self.limit) or self.waiting:
            await self._wait(key, priority + key.priority, began, target)
        else:
            self._account(self._tenant(key))
            self.inside += 1
        leave = Pass(self, loop.time(), target)
        try:
            yield leave
        finally:
            leave.drop()

    async def _wait(self, key: Key, priority: int, began: float, target: float) -> None:
        expected = self.predicted(self.waiting + 1)
        if self.waiting >= self._line_limit or expected > target:
            raise Refused("The first token would come too late for its target; try again later.", expected)
        tenant, future = self._tenant(key), asyncio.get_running_loop().create_future()
        deadline = began + self._wait_share * target
        heapq.heappush(tenant.line, (priority, deadline, next(self._order), future))
        self.waiting += 1
        try:
            async with asyncio.timeout_at(deadline):
                await future
        except BaseException as exc:
            if future.done() and not future.cancelled():
                self.free()  # leave was given in the very moment of leaving
            else:
                future.cancel()
                self.waiting -= 1
            if isinstance(exc, TimeoutError):
                raise Refused("No place became free in time; try again later.", self.predicted(self.waiting)) from exc
            raise

    def _tenant(self, key: Key) -> Tenant:
        found = self._tenants.get(key.name)
        if found is None:
            found = self._tenants[key.name] = Tenant(key, self._virtual)
        return found

    def _account(self, tenant: Tenant) -> None:
        """One more for this tenant. One that was away does not come back with a claim on the past."""
        tenant.given = max(tenant.given, self._virtual) + 1 / tenant.key.weight

    def left(self, began: float, target: float) -> None:
        now = asyncio.get_running_loop().time()
        took = now - began
        self._time += 0.2 * (took - self._time) if self._time else took
        if took > target:
            if now - self._turned_down >= target:
                self.limit, self._turned_down = max(1.0, self.limit * SMALLER), now
        elif self.inside >= int(self.limit):
            self.limit = min(MOST, self.limit + 1 / self.limit)
        self.free()

    def free(self) -> None:
        self.inside -= 1
        while self.inside < int(self.limit) and (future := self._next()) is not None:
            self.inside += 1
            future.set_result(None)

    def _next(self) -> asyncio.Future[None] | None:
        """The next in line: the best priority, then the tenant that has had least, then the earliest deadline."""
        for tenant in self._tenants.values():
            while tenant.line and tenant.line[0][3].done():
                heapq.heappop(tenant.line)
        waiting = [tenant for tenant in self._tenants.values() if tenant.line]
        if not waiting:
            return None
        tenant = min(waiting, key=lambda t: (t.line[0][0], t.given))
        self._virtual = max(self._virtual, tenant.given)
        self._account(tenant)
        self.waiting -= 1
        return heapq.heappop(tenant.line)[3]

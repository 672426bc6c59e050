"""The instances behind the proxy: which are up, what runs on each, which models they serve.

An instance is up when its last probe of /health answered 200. It goes down after `FAILURES` probes in a row (a busy
engine may answer late) or at once when it refuses a connection, and comes back with its next good probe. Routing reads
this view and never waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pdserve import log
from pdserve.proxy.lifetime import Deadlines
from pdserve.proxy.policies.base import Facts, Policy
from pdserve.proxy.upstream import LegFailure, Upstream

PROBE_EVERY = 1.0
FAILURES = 3
_MODELS_LIMIT = 4 * 1024 * 1024
_log = log.get("proxy.fleet")


@dataclass(eq=False)
class Instance:
    """One engine. `role` is prefill, decode or both."""

    name: str
    role: str
    upstream: Upstream
    up: bool = False
    in_flight: int = 0
    failures: int = 0
    models: frozenset[str] = frozenset()

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Counts a request as running here."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


@dataclass(eq=False)
class Fleet:
    """The live view. `start` probes once before it returns, so that what is up at start is known at start."""

    instances: Sequence[Instance]
    deadlines: Deadlines
    metrics: dict[str, Any]
    served: frozenset[str] = frozenset()  # names given on the command line, beside what the engines report
    probe_every: float = PROBE_EVERY
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> None:
        await asyncio.gather(*(self.probe(instance) for instance in self.instances))
        self._tasks = [asyncio.create_task(self._watch(i), name=f"probe {i.name}") for i in self.instances]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        for instance in self.instances:
            await instance.upstream.close()

    def producers(self) -> list[Instance]:
        return [i for i in self.instances if i.up and i.role == "prefill"]

    def consumers(self) -> list[Instance]:
        return [i for i in self.instances if i.up and i.role in ("decode", "both")]

    @property
    def ready(self) -> bool:
        return any(i.up and i.role in ("decode", "both") for i in self.instances)

    @property
    def models(self) -> frozenset[str]:
        """Every model name that a request may use; empty if none is known, and then none is refused."""
        return self.served.union(*(i.models for i in self.instances))

    def choose(
        self, policy: Policy, facts: Facts, of: Sequence[Instance], but: Sequence[Instance] = ()
    ) -> Instance | None:
        """The policy's pick among `of` without those already tried; None if there is none left."""
        left = [i for i in of if i not in but]
        return policy.pick(facts, left) if left else None

    def failed(self, instance: Instance, leg: str, failure: LegFailure, rid: str) -> None:
        """Notes a failed leg. Only a refused connection says something of the instance as a whole."""
        self.metrics["leg_failures_total"].labels(instance.name, leg, failure.reason).inc()
        _log.warning("request %s: %s leg failed: %s", rid, leg, failure)
        if failure.reason == "connect" and failure.status == 502:
            self._set_up(instance, False, "it refuses connections")

    async def probe(self, instance: Instance) -> None:
        try:
            async with asyncio.timeout(self.deadlines.probe):
                status = await self._status(instance)
                if status == 200 and not instance.models:
                    instance.models = await self._ask_models(instance)
        except (LegFailure, TimeoutError) as exc:
            status, why = 0, str(exc) or f"no answer within {self.deadlines.probe:g} s"
        else:
            why = f"/health answered {status}"
        if status == 200:
            instance.failures = 0
            self._set_up(instance, True, why)
            return
        instance.failures += 1
        if instance.failures >= FAILURES or not instance.up:
            self._set_up(instance, False, why)

    async def _watch(self, instance: Instance) -> None:
        while True:
            await asyncio.sleep(self.probe_every)
            try:
                await self.probe(instance)
            except Exception:  # noqa: BLE001 - a bug met by one probe must not freeze the view of this instance for good
                _log.exception("the probe of %s failed in an unforeseen way", instance.name)

    async def _status(self, instance: Instance) -> int:
        async with instance.upstream.request(b"GET", b"/health", (), b"", self.deadlines.connect) as answer:
            await answer.read(_MODELS_LIMIT)
            return answer.status

    async def _ask_models(self, instance: Instance) -> frozenset[str]:
        """What the engine serves, LoRA adapters included. An engine that wants a key for it is believed unseen."""
        async with instance.upstream.request(b"GET", b"/v1/models", (), b"", self.deadlines.connect) as answer:
            raw = await answer.read(_MODELS_LIMIT)
        try:
            listed = msgspec.json.decode(raw, type=_Models) if answer.status == 200 else _Models([])
        except msgspec.DecodeError:
            _log.warning("%s: its /v1/models is not a model list; no name is checked against it", instance.name)
            return frozenset()
        return frozenset(model.id for model in listed.data)

    def _set_up(self, instance: Instance, up: bool, why: str) -> None:
        if instance.up != up:
            _log.info("%s is %s: %s", instance.name, "up" if up else "down", why)
        instance.up = up
        if not up:
            instance.models = frozenset()  # it may come back serving something else
        self.metrics["instance_up"].labels(instance.name, instance.role).set(up)

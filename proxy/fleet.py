"""The instances behind the proxy: which are up, what runs on each, which models they serve.

An instance is up when its last probe of /health answered 200. It goes down after `FAILURES` probes in a row (a busy
engine may answer late), at once when it refuses a connection, and for a rest when its legs keep failing; it comes back
on trial with its next good probe (instance.py). Routing reads this view and never waits for it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pdserve import log
from pdserve.errors import RequestError
from pdserve.proxy import series
from pdserve.proxy.instance import Instance, preferred
from pdserve.proxy.lifetime import Deadlines
from pdserve.proxy.policies.base import Facts, Policy
from pdserve.proxy.shared import Alone, Listed, Shared
from pdserve.proxy.upstream import LegFailure, Upstream

PROBE_EVERY = 1.0
LOAD_EVERY = 2  # probes between two looks at an engine's /metrics, which cost it more than a probe
FAILURES = 3
_MODELS_LIMIT = 4 * 1024 * 1024
_LOAD = re.compile(rb"^vllm:num_requests_(?:running|waiting)\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)
_BORN = re.compile(rb"^process_start_time_seconds ([0-9.e+]+)$", re.MULTILINE)
_log = log.get("proxy.fleet")


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


@dataclass(eq=False)
class Fleet:
    """The live view. `start` probes once before it returns, so that what is up at start is known at start."""

    instances: list[Instance]
    deadlines: Deadlines
    metrics: dict[str, Any]
    served: frozenset[str] = frozenset()  # names given on the command line, beside what the engines report
    probe_every: float = PROBE_EVERY
    shared: Shared = field(default_factory=Alone)
    on_new_life: Callable[[str], None] | None = None  # told of an engine that has lost what it had
    _tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _told: list[frozenset[str]] = field(default_factory=list)  # of `models`, which each request asks for
    _models: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self._models = self.served

    async def start(self) -> None:
        await self.follow()
        for instance in self.instances:
            instance.shared = self.shared
        await asyncio.gather(*(self.probe(instance) for instance in self.instances))
        for instance in self.instances:
            self._tasks[instance.name] = asyncio.create_task(self._watch(instance), name=f"probe {instance.name}")
        self._tasks[""] = asyncio.create_task(self._follow(), name="probe list")

    async def stop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()
        for instance in self.instances:
            await instance.upstream.close()

    async def add(self, instance: Instance) -> None:
        """Takes an instance in and probes it once; afterwards it is watched like the others."""
        if self.named(instance.name) is not None:
            raise RequestError(409, f"There is an instance {instance.name!r} already.", "conflict", "name")
        instance.shared = self.shared
        self.instances.append(instance)
        await self.probe(instance)
        self._tasks[instance.name] = asyncio.create_task(self._watch(instance), name=f"probe {instance.name}")

    async def remove(self, instance: Instance) -> None:
        """Lets an instance finish what it has and forgets it. What runs longer than the drain deadline is not stopped,
        but no longer waited for."""
        instance.draining = True
        _log.info("%s is draining: %d requests", instance.name, instance.in_flight)
        end = asyncio.get_running_loop().time() + self.deadlines.drain
        while instance.in_flight and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110 - a count, not an event
            await asyncio.sleep(0.05)
        if (task := self._tasks.pop(instance.name, None)) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if instance in self.instances:
            self.instances.remove(instance)
        await instance.upstream.close()
        if self.named(instance.name) is None:  # another may have its name by now
            series.forget(self.metrics, instance.name)
        _log.info("%s is removed", instance.name)

    def listed(self) -> Listed:
        return {i.name: (i.role, i.upstream.url) for i in self.instances if not i.draining}

    async def follow(self) -> None:
        """Does what another worker was told of instances."""
        wanted = self.shared.listed()
        if wanted is None:
            return
        for name, (role, url) in wanted.items():
            if self.named(name) is None:
                await self.add(Instance(name, role, Upstream(name, url)))
        for instance in [i for i in self.instances if i.name not in wanted and not i.draining]:
            instance.draining = True
            task = asyncio.create_task(self.remove(instance), name=f"drain {instance.name}")
            self._tasks[f"drain {instance.name}"] = task

    async def _follow(self) -> None:
        while not isinstance(self.shared, Alone):
            await asyncio.sleep(self.probe_every)
            try:
                await self.follow()
            except Exception:  # noqa: BLE001 - as in _watch
                _log.exception("the list of instances could not be followed")

    @property
    def names(self) -> list[str]:
        return [i.name for i in self.instances]

    def named(self, name: str) -> Instance | None:
        return next((i for i in self.instances if i.name == name), None)

    def producers(self) -> list[Instance]:
        return preferred([i for i in self.instances if i.up and not i.draining and i.role == "prefill"])

    def consumers(self) -> list[Instance]:
        return preferred([i for i in self.instances if i.up and not i.draining and i.role != "prefill"])

    @property
    def ready(self) -> bool:
        return any(i.usable for i in self.instances if i.role != "prefill")

    @property
    def models(self) -> frozenset[str]:
        """Every model name that a request may use; empty if none is known, and then none is refused."""
        told = [i.models for i in self.instances]
        if told != self._told:
            self._told, self._models = told, self.served.union(*told)
        return self._models

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
        if _is_refusal(failure):
            self._set_up(instance, False, "it refuses connections")
        elif any(
            i.usable for i in self.instances if i is not instance and i.role == instance.role
        ) and instance.went_badly(failure, asyncio.get_running_loop().time()):
            self._set_up(instance, False, "too many requests failed on it")

    async def probe(self, instance: Instance) -> None:
        try:
            async with asyncio.timeout(self.deadlines.probe):
                status = await self._status(instance)
                if status == 200 and not instance.models:
                    instance.models = await self._ask_models(instance)
                if status == 200 and instance.up:
                    await self._ask_load(instance)
        except (LegFailure, TimeoutError) as exc:
            status, why = 0, str(exc) or f"no answer within {self.deadlines.probe:g} s"
            if _is_refusal(exc):
                instance.failures = FAILURES  # nobody listens there: asking again would not change it
        else:
            why = f"/health answered {status}"
        if status == 200:
            instance.failures = 0
            if asyncio.get_running_loop().time() >= instance.rest_until:
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

    async def _ask_load(self, instance: Instance) -> None:
        """What runs and waits there, whoever sent it. An engine that does not tell has our own requests only."""
        instance.probes += 1
        if instance.probes % LOAD_EVERY:
            return
        async with instance.upstream.request(b"GET", b"/metrics", (), b"", self.deadlines.connect) as answer:
            raw = await answer.read(_MODELS_LIMIT)
        if answer.status == 200:
            instance.exposed = raw
            self._note_birth(instance, raw)
        if answer.status == 200 and (found := _LOAD.findall(raw)):
            instance.told_load(int(sum(map(float, found))))

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

    def _note_birth(self, instance: Instance, exposed: bytes) -> None:
        """An engine may have died and come back between two probes."""
        if (found := _BORN.search(exposed)) is None:
            return
        if instance.born not in (b"", found[1]):
            self._new_life(instance)
        instance.born = found[1]

    def _new_life(self, instance: Instance) -> None:
        if self.on_new_life is not None:
            self.on_new_life(instance.name)

    def _set_up(self, instance: Instance, up: bool, why: str) -> None:
        if instance.up != up:
            _log.info("%s is %s: %s", instance.name, "up" if up else "down", why)
            instance.trial = up and instance.was_up
        instance.up = up
        instance.was_up = instance.was_up or up
        if not up:
            if instance.was_up:
                self._new_life(instance)
            instance.others = 0
            instance.exposed = b""
            instance.models = frozenset()  # it may come back serving something else
        self.metrics["instance_up"].labels(instance.name, instance.role).set(up)


def _is_refusal(exc: LegFailure | TimeoutError) -> bool:
    return isinstance(exc, LegFailure) and exc.reason == "connect" and exc.status == 502

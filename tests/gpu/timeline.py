"""Where the time to the first token goes: stamps inside a vLLM engine that runs in this process (engine_probe.py)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

#: a phase ends with its stamp and begins where the one before it ends; a plain engine has no stamps of ours
PHASES = (
    ("input", "request made", "generate() is called, until the engine's core has its request"),
    ("hashing", "hashed", "  the core's request is made: its blocks are hashed"),
    ("queue", "lookup", "until the engine's own cache was looked at, and ours is asked"),
    ("lookup", "looked up", "  keys, and the daemon's answer"),
    ("blocks", "allocated", "  blocks are taken"),
    ("plan", "planned", "  the load is planned"),
    ("to the worker", "load begins", "until the worker has the plan"),
    ("first chunk", "first chunk", "  until the first chunk is in its blocks"),
    ("other chunks", "load ends", "  until the last one is"),
    ("noticed", "reported", "until a step takes the news along"),
    ("to its step", "scheduled", "until the request is scheduled"),
    ("step", "computed", "until its step has a token"),
    ("output", "answered", "until generate() returns"),
)


class Timeline:
    """The first time of each stamp since begin()."""

    def __init__(self, llm: Any, worker: Any) -> None:
        self._at: dict[str, float] = {}
        engine = llm.llm_engine
        core = engine.engine_core.engine_core
        scheduler = core.scheduler
        self._before(core, "preprocess_add_request", "request made")
        self._after(core, "preprocess_add_request", "hashed")
        self._around_schedule(scheduler)
        self._after(scheduler, "update_from_output", "computed", lambda found: bool(_tokens(found)))
        connector = getattr(scheduler, "connector", None)
        if worker is None or connector is None:
            return
        self._before(connector, "get_num_new_matched_tokens", "lookup")
        self._after(connector, "get_num_new_matched_tokens", "looked up")
        self._before(connector, "update_state_after_alloc", "allocated")
        self._after(connector, "build_connector_meta", "planned", lambda plan: bool(plan.loads))
        loader, finished = worker._loader, worker.finished
        self._before(loader, "put", "load begins")
        done = loader._done

        def loaded(*args: Any) -> None:
            self._stamp("load ends")
            done(*args)

        loader._done = loaded

        def noticed() -> Any:
            found = finished()
            if found[1]:
                self._stamp("reported")
            return found

        worker.finished = noticed
        self._watch_chunks()

    def begin(self) -> None:
        self._at.clear()
        self._start = time.perf_counter()

    def end(self) -> dict[str, float]:
        """{phase: ms}, in PHASES' order; a stamp that did not come, or not in its turn, has no phase."""
        self._stamp("answered")
        found, last = {}, self._start
        for phase, stamp, _ in PHASES:
            at = self._at.get(stamp)
            if at is not None and at >= last:
                found[phase] = (at - last) * 1e3
                last = at
        found["all"] = (last - self._start) * 1e3
        return found

    def _stamp(self, name: str) -> None:
        self._at.setdefault(name, time.perf_counter())

    def _before(self, there: Any, method: str, name: str) -> None:
        call = getattr(there, method)

        def stamped(*args: Any, **kwargs: Any) -> Any:
            self._stamp(name)
            return call(*args, **kwargs)

        setattr(there, method, stamped)

    def _after(self, there: Any, method: str, name: str, counts: Callable[[Any], bool] = lambda _: True) -> None:
        call = getattr(there, method)

        def stamped(*args: Any, **kwargs: Any) -> Any:
            found = call(*args, **kwargs)
            if counts(found):
                self._stamp(name)
            return found

        setattr(there, method, stamped)

    def _around_schedule(self, scheduler: Any) -> None:
        call = scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            if output.total_num_scheduled_tokens:
                self._stamp("scheduled")
            return output

        scheduler.schedule = schedule

    def _watch_chunks(self) -> None:
        """A load's first chunk that was found in its blocks, as it was stored."""
        from pdserve.engines.vllm.loading import _Load

        if not hasattr(_Load, "unwatched"):
            _Load.unwatched = _Load._matches
        matches = _Load.unwatched

        def seen(load: Any, *args: Any) -> bool:
            found = matches(load, *args)
            self._stamp("first chunk")
            return found

        _Load._matches = seen


def _tokens(outputs: Any) -> list[Any]:
    return [o for of_client in outputs.values() for o in of_client.outputs if o.new_token_ids]

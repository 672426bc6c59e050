"""The workers' half: copies blocks into the arena and back, on threads of its own, while the engine steps.

Nothing here may raise into the engine (an exception in a worker kills it) or make a step wait, with one exception:
blocks of a preempted request are about to be overwritten, so a copy of them that is running is waited for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

from pdserve import log
from pdserve.engines.vllm.facts import Nobody, StoreFacts, Teller
from pdserve.engines.vllm.giving_way import GivingWay
from pdserve.engines.vllm.loading import Loader
from pdserve.engines.vllm.messages import LoadJob, LoadResult, StepPlan, WorkerReport
from pdserve.engines.vllm.naps import clock
from pdserve.engines.vllm.parts import Parts
from pdserve.engines.vllm.quick import Quick
from pdserve.engines.vllm.saving import Saver
from pdserve.errors import CacheError
from pdserve.transfer.client import CacheClient
from pdserve.transfer.staging import Pages

#: how long a step that computes nothing may wait for a copy to end; a request that arrives meanwhile waits as long
IDLE_S, IDLE_GPU_S = 0.005, 0.0005


class WorkerSide:
    """One per worker process. `pages` is set once vLLM has registered its KV caches."""

    def __init__(
        self, client: CacheClient, *, shards: int, writer: str, teller: Teller | Nobody | None = None, load_share: float | None = None
    ) -> None:
        self._client = client
        self._pages: Parts | None = None
        self._log = log.get("connector")
        self._lock = threading.Condition()
        self._report = WorkerReport()
        self._awaiting: set[str] = set()  # ended requests whose blocks are kept until their saves are done
        self._received: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._loading: set[str] = set()
        self._quick: Quick | None = None
        self._idle = False  # whether this step computes nothing
        self._way = GivingWay(load_share)
        self._loader = Loader(client, self._loaded, way=self._way)
        self._facts = StoreFacts(teller or Nobody())
        self._saver = Saver(client, self._saved, shards=shards, writer=writer, facts=self._facts, way=self._way)

    def register(self, parts: Sequence[Pages], quick: Quick | None = None) -> None:
        """`parts`: one for each layer group. Both are closed with this."""
        self._quick = quick
        self._pages = pages = Parts(parts)
        self._log.info("kernels: %s", pages.describe())
        if pages.on_device:
            # No daemon: the client has warned, and the arena is attached when one is there.
            with contextlib.suppress(CacheError):
                self._client.connect()
                if self._client.arena is not None:
                    pages.attach(self._client.arena, self._client.chunk_tokens)
        self._saver.start(pages)
        self._loader.start(pages)

    # ---- called by the engine, every step ----

    def start_loads(self, plan: StepPlan) -> None:
        if self._pages is None:
            return
        self._way.answers = plan.answers if self._pages.on_device else 0
        if self._quick is not None:
            self._quick.step(plan.answers > 0 and not self._saver.busy and not self._loading)
        with self._lock:
            # Here and not with the saves: some vLLM versions announce no saves in a step that computes nothing.
            self._awaiting |= plan.awaiting
            self._loading |= {job.request_id for job in plan.loads}
            self._idle = plan.idle
        self._loader.drop(plan.dropped)
        # Blocks that a load fills may have belonged to a request whose last step is still running on the device.
        mark = self._pages.mark() if plan.loads else None
        for job in plan.loads:
            self._loader.put(job, mark)

    def start_saves(self, plan: StepPlan) -> None:
        """The step has been submitted: what it computes may be copied after this point."""
        if plan.saves and self._pages is not None:
            self._saver.put(plan.saves, self._pages.mark())

    def before_overwrite(self, plan: StepPlan) -> None:
        self._saver.cancel(plan.preempted)

    def finished(self) -> tuple[set[str], set[str], set[int]]:
        """(saves done of awaited requests, loads ended, blocks that these failed to fill), each reported once."""
        with self._lock:
            # An engine that only waits asks again and again, and takes the core from whoever computes what it waits for.
            if self._idle and (self._loading or self._awaiting) and not self._any_result():
                self._lock.wait(IDLE_GPU_S if self._pages is not None and self._pages.on_device else IDLE_S)
            sent = {r for r in self._awaiting if not self._saver.outstanding(r)}
            self._awaiting -= sent
            received, self._received = self._received, set()
            blocks, self._failed_blocks = self._failed_blocks, set()
        return sent, received, blocks

    def _any_result(self) -> bool:
        return bool(self._received) or any(not self._saver.outstanding(r) for r in self._awaiting)

    def report(self) -> WorkerReport | None:
        with self._lock:
            if not self._report.saved and not self._report.loaded:
                return None
            report, self._report = self._report, WorkerReport()
        return report

    def close(self) -> None:
        ended = [part.stop() for part in (self._saver, self._loader)]
        if self._quick is not None:
            self._quick.close()
        if self._pages is not None and all(ended):
            self._pages.close()
        self._facts.close()
        self._client.close()

    # ---- called by the threads ----

    def _moved(self) -> None:
        if self._quick is not None:
            self._quick.used()

    def _loaded(self, job: LoadJob, result: LoadResult, unfilled: set[int]) -> None:
        self._moved()
        with self._lock:
            self._failed_blocks |= unfilled
            self._received.add(job.request_id)
            self._report.loaded[job.request_id] = result
            self._loading.discard(job.request_id)
            self._lock.notify_all()
        clock.ended()  # where the engine core is in this process

    def _saved(self, request_id: str) -> None:
        self._moved()
        with self._lock:
            self._report.saved[request_id] = self._report.saved.get(request_id, 0) + 1

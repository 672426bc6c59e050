"""Blocking calls with a deadline that holds even where the library underneath knows none.

A tier's I/O runs on a few threads of its own. The caller waits until its deadline and then leaves; the thread is left
behind and finishes when its socket or file system lets it. Two rules make leaving safe:
  * a job touches the caller's arrays only through Operation.copy(), which refuses once the caller has left;
  * a job may register what wakes it (shutting its socket down, say), so that threads are not lost to a dead server.
The threads are daemons: one that hangs in a dead NFS mount does not keep the process from ending.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from pdserve.transfer.tiers.base import TierError

T = TypeVar("T")
Job = Callable[["Operation"], T]


class DeadlinePassed(TierError):
    """The tier did not answer in time."""


class Operation:
    """What the jobs of one call share: the arrays of a caller who may leave at any time."""

    def __init__(self, jobs: int) -> None:
        self.results: list[Any] = [None] * jobs
        self.error: BaseException | None = None
        self.done = threading.Event()
        self._left = jobs
        self._lock = threading.Lock()
        self._cut = False
        self._wakers: set[Callable[[], None]] = set()

    @property
    def over(self) -> bool:
        """The caller has left: nothing that is still done for it counts."""
        return self._cut

    def copy(self, to: np.ndarray, source: np.ndarray | memoryview | bytes) -> None:
        """Copies to or from an array of the caller's. Raises DeadlinePassed when the caller has left."""
        with self._lock:
            if self._cut:
                raise DeadlinePassed("the caller has left")
            np.copyto(to, np.frombuffer(source, np.uint8))

    @contextmanager
    def woken_by(self, wake: Callable[[], None]) -> Iterator[None]:
        """While inside, `wake` is called when the caller leaves. It must be quick and safe from another thread."""
        with self._lock:
            if self._cut:
                raise DeadlinePassed("the caller has left")
            self._wakers.add(wake)
        try:
            yield
        finally:
            with self._lock:
                self._wakers.discard(wake)

    def cut(self) -> None:
        """The caller leaves. Returns when no job touches its arrays any more."""
        with self._lock:
            self._cut = True
            for wake in self._wakers:
                wake()

    def finish(self, index: int, result: object, error: BaseException | None) -> None:
        with self._lock:
            self.results[index] = result
            self.error = self.error or error
            self._left -= 1
            if self.error is not None or not self._left:
                self.done.set()


class Offload:
    """The threads of one tier."""

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[tuple[Operation, int, Job[Any]] | None] = queue.SimpleQueue()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"pdserve-{name}-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, jobs: Sequence[Job[T]], deadline: float) -> list[T]:
        """Results of all jobs, run side by side. Raises the first error, or DeadlinePassed; then the others are over too."""
        if self._closed:
            raise TierError(f"{self._name}: closed")
        if not jobs:
            return []
        operation = Operation(len(jobs))
        for i, job in enumerate(jobs):
            self._queue.put((operation, i, job))
        # Also when the deadline has passed already: then nothing was begun, or its result is not used.
        in_time = operation.done.wait(max(0.0, deadline - time.monotonic()))
        if not in_time or operation.error is not None:
            operation.cut()
        if not in_time:
            raise DeadlinePassed(f"{self._name}: no answer before the deadline")
        if operation.error is not None:
            raise operation.error
        return operation.results

    def call(self, job: Job[T], deadline: float) -> T:
        return self.run([job], deadline)[0]

    def start(self, job: Job[Any]) -> None:
        """Something to do when a thread is free, of which nobody hears: cleaning up after a failure."""
        if not self._closed:
            self._queue.put((Operation(1), 0, job))

    def close(self, timeout: float) -> None:
        """Ends the threads; one that hangs in a system call is left to itself after `timeout` seconds."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        ends = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            operation, index, job = item
            if operation.over:
                continue
            result, error = None, None
            try:
                result = job(operation)
            except BaseException as e:  # noqa: BLE001  raised again by the caller
                error = e
            operation.finish(index, result, error)
            del operation, job, item, result, error  # arrays of the caller's are not kept until the next job

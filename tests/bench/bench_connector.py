#!/usr/bin/env python
"""What the connector costs the engine's own thread: its methods, called as vLLM calls them in each step, without an engine.

    .venv/bin/python -P tests/bench/bench_connector.py [--rounds N] [--json FILE] [--profile SCENARIO] [--requests 24,256]

Beside it a connector that does nothing (tests/gpu/null_connector.py), in turn. A real cache daemon, real shared memory, plain
arrays for the engine's blocks. `step` is the engine thread's time in the connector per step, `others` the processor time of the
connector's own threads per step: under one interpreter lock the engine may have to wait for them. Medians.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import random
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

from null_connector import NullConnector
from running_cache import RunningCache
from scheduler_output import step
from vllm import SamplingParams
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from pdserve import log
from pdserve.chunk import CANONICAL, ChunkLayout
from pdserve.engines.vllm.connector import PdserveConnector
from pdserve.engines.vllm.facts import Teller
from pdserve.engines.vllm.scheduler_side import SchedulerSide
from pdserve.engines.vllm.worker_side import WorkerSide
from pdserve.transfer.client import CacheClient
from pdserve.transfer.staging_host import HostPages

BLOCK, LAYERS, BLOCK_BYTES, BLOCKS = 16, 2, 1024, 1 << 17
BUDGET = 8192  # tokens a step computes at most
LAYOUT = ChunkLayout(
    kind=CANONICAL, kv_dtype="bfloat16", layers=LAYERS, block_tokens=BLOCK, block_bytes=BLOCK_BYTES, shards=1
)
Half = tuple[Any, Any]  # the connector in the scheduler, and in the worker


class Engine:
    """Drives both halves through steps, and times what they take."""

    def __init__(self, name: str, scheduler: Any, worker: Any) -> None:
        self.name, self.scheduler, self.worker = name, scheduler, worker
        self._requests: dict[str, Request] = {}
        self._computed: dict[str, int] = {}
        self._new: list[tuple[str, int]] = []
        self._next_block = 0
        self._blocks: dict[str, int] = {}
        self._waiting: set[str] = set()  # for a load
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.profile: cProfile.Profile | None = None

    def _timed(self, call: Callable[..., Any], *args: Any) -> Any:
        if self.profile is not None:
            self.profile.enable()
        start, cpu = time.perf_counter(), time.thread_time()
        found = call(*args)
        self._spent += time.perf_counter() - start
        self._cpu += time.thread_time() - cpu
        if self.profile is not None:
            self.profile.disable()
        return found

    def add(self, request_id: str, tokens: list[int], out: int) -> None:
        params = SamplingParams(max_tokens=out, ignore_eos=True)
        self._requests[request_id] = Request(request_id, tokens, params, None)

    def run(self, local: int = 0) -> list[float]:
        """All requests that were added, until each has its last token; `local` tokens are in the engine's own cache."""
        self.seconds, self.cpu, ended, waiting = [], [], set[str](), list(self._requests)
        for request in self._requests.values():
            self._spent = self._cpu = 0.0
            self._timed(self.scheduler.on_new_request, request)
        while self._requests:
            self._spent, self._cpu, preempted = 0.0, 0.0, ()
            scheduled, new, cached = dict[str, int](), [], []
            budget = BUDGET
            for rid in [r for r in self._computed if r not in self._waiting]:
                computed, request = self._computed[rid], self._requests[rid]
                count = min(budget, request.num_tokens - computed)
                if count > 0:
                    before = -(-computed // BLOCK)
                    fresh = self._take(-(-(computed + count) // BLOCK) - before)
                    cached.append((rid, (fresh,) if fresh else None, computed))
                    scheduled[rid], budget = count, budget - count
            while waiting and budget > 0:
                rid = waiting[0]
                request = self._requests[rid]
                at = self._blocks.pop(rid, -1)
                if at < 0:
                    external, asynchronous = self._timed(self.scheduler.get_num_new_matched_tokens, request, local)
                    if external is None:
                        break
                    have = local + external
                else:  # its load has ended
                    have, external, asynchronous = at, 0, False
                count = 0 if asynchronous else min(budget, request.num_tokens - have)
                ids = self._take(-(-(have + count) // BLOCK))
                blocks = types.SimpleNamespace(get_block_ids=lambda ids=ids: (ids,))
                self._timed(self.scheduler.update_state_after_alloc, request, blocks, external)
                waiting.pop(0)
                if asynchronous:
                    self._waiting.add(rid)
                    self._blocks[rid] = min(have, request.num_tokens - 1)
                    continue
                new.append((rid, have))
                self._computed[rid] = have
                scheduled[rid], budget = count, budget - count
            output = step(scheduled, new, cached, preempted)
            output.finished_req_ids, ended = ended, set()
            meta = self._timed(self.scheduler.build_connector_meta, output)
            for rid, count in scheduled.items():
                self._computed[rid] += count
            made = self._worker_step(meta, output)
            for rid in list(scheduled):
                request = self._requests[rid]
                if self._computed[rid] >= request.num_tokens:
                    request.append_output_token_ids(7)
                    if request.num_output_tokens >= request.max_tokens:
                        request.status = types.SimpleNamespace(name="FINISHED_LENGTH_CAPPED")  # type: ignore[assignment]
                        self._timed(self.scheduler.request_finished, request, [])
                        ended.add(rid)
                        del self._requests[rid], self._computed[rid]
            self._timed(self.scheduler.update_connector_output, made)
            self._timed(self.scheduler.get_kv_connector_stats)
            self._timed(self.scheduler.take_events)
            for rid in made.finished_recving or ():
                self._waiting.discard(rid)
                waiting.insert(0, rid)
            self.seconds.append(self._spent)
            self.cpu.append(self._cpu)
        self._waiting.clear()
        self._blocks.clear()
        return self.seconds

    def _take(self, count: int) -> list[int]:
        if self._next_block + count > BLOCKS:
            self._next_block = 0
        self._next_block += count
        return list(range(self._next_block - count, self._next_block))

    def _worker_step(self, meta: Any, output: Any) -> KVConnectorOutput:
        w, made = self.worker, KVConnectorOutput()
        self._timed(w.handle_preemptions, meta)
        self._timed(w.bind_connector_metadata, meta)
        self._timed(w.start_load_kv, None)
        if output.total_num_scheduled_tokens:
            self._timed(w.wait_for_save)
        made.finished_sending, made.finished_recving = self._timed(w.get_finished, output.finished_req_ids)
        made.invalid_block_ids = self._timed(w.get_block_ids_with_load_errors)
        made.kv_connector_stats = self._timed(w.get_kv_connector_stats)
        made.kv_cache_events = self._timed(w.get_kv_connector_kv_cache_events)
        made.kv_connector_worker_meta = self._timed(w.build_connector_worker_meta)
        self._timed(w.clear_connector_metadata)
        return made

    def drain(self) -> None:
        """Steps that compute nothing, until no save is under way."""
        end = time.monotonic() + 60
        saver = self.worker._worker._saver if isinstance(self.worker, PdserveConnector) else None
        while saver is not None and saver._outstanding and time.monotonic() < end:
            time.sleep(0.002)
        self._spent, self._cpu, output = 0.0, 0.0, step({})
        output.finished_req_ids = set()
        self.scheduler.update_connector_output(self._worker_step(self.scheduler.build_connector_meta(output), output))


def ours(socket: str, kv: np.ndarray, mode: str = "always") -> Half:
    """Both halves as the connector makes them, without the configuration of an engine."""
    halves = []
    for scheduler in (True, False):
        c = PdserveConnector.__new__(PdserveConnector)
        c._connector_metadata, c._failed_blocks, c._log = None, set(), log.get("connector")
        c._scheduler = c._worker = None
        client = CacheClient(socket, "bench/scheduler" if scheduler else "bench/worker-0")
        if scheduler:
            c._scheduler = SchedulerSide(
                client, LAYOUT, "bench", workers=1, instance="bench", mode=mode, teller=Teller(socket, "bench")
            )  # fmt: skip
            c._connect(client)
        else:
            c._worker = WorkerSide(client, shards=1, writer="bench", teller=Teller(socket, "bench"))
            bases = [[kv.ctypes.data + i * BLOCKS * BLOCK_BYTES for i in range(LAYERS)]]
            c._worker.register([HostPages(bases, [BLOCK_BYTES] * LAYERS, BLOCK_BYTES, BLOCKS)])
        halves.append(c)
    return halves[0], halves[1]


def nothing() -> Half:
    halves = []
    for _ in range(2):
        c = NullConnector.__new__(NullConnector)
        c._connector_metadata = None
        halves.append(c)
    return halves[0], halves[1]


def prompts(seed: int, count: int, length: int) -> Iterator[list[int]]:
    r = random.Random(seed)
    for _ in range(count):
        yield [r.randrange(100, 49000) for _ in range(length)]


def one(engine: Engine, which: str, requests: int, seed: int) -> dict[str, float]:
    """Microseconds per step: of the engine's thread, and of all others."""
    length = 20000 if which.startswith("dram") else 4000
    tokens = list(prompts(seed, requests, length))

    def batch(name: str, out: int, local: int) -> list[float]:
        for i, prompt in enumerate(tokens):
            engine.add(f"{name}-{seed}-{i}", prompt, out)
        mine, every = time.thread_time(), time.process_time()
        seconds = engine.run(local)
        cpu[:] = engine.cpu
        others[0] = (time.process_time() - every) - (time.thread_time() - mine)
        engine.drain()
        return seconds

    others, cpu = [0.0], list[float]()
    if which == "decode":
        seconds = batch("a", 300, 3984)[-290:]  # the steps in which all of them decode
        cpu = cpu[-290:]
        return {"step": statistics.median(seconds) * 1e6, "cpu": statistics.median(cpu) * 1e6, "mean": statistics.fmean(cpu) * 1e6}
    if which == "new":
        seconds = batch("a", 2, 0)
    elif which == "cached":
        batch("a", 2, 0)
        seconds = batch("b", 2, 3984)
    else:
        batch("a", 2, 0)
        seconds = batch("b", 2, 0)
    return {"request": sum(seconds) / requests * 1e6, "cpu": sum(cpu) / requests * 1e6, "others": others[0] / requests * 1e6}


SCENARIOS = {
    "decode": "pure decoding, microseconds a step",
    "new": "4000 tokens, nothing to reuse: computed in chunks and stored; microseconds a request",
    "cached": "4000 tokens, all in the engine's own cache; microseconds a request",
    "dram": "20000 tokens, loaded; microseconds a request",
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", default="24,256")
    parser.add_argument("--only", default=",".join(SCENARIOS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", choices=tuple(SCENARIOS))
    args = parser.parse_args()
    kv = np.zeros(LAYERS * BLOCKS * BLOCK_BYTES, np.uint8)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = RunningCache(Path(folder), "bench", 2 << 30)
        try:
            engines = [Engine("null", *nothing()), Engine("pdserve", *ours(str(cache.socket), kv))]
            if args.profile:
                engines[1].profile = cProfile.Profile()
                for again in range(args.rounds):
                    one(engines[1], args.profile, int(args.requests.split(",")[0]), 1000 + again)
                pstats.Stats(engines[1].profile).sort_stats("tottime").print_stats(35)
                return 0
            for which in args.only.split(","):
                for count in [int(n) for n in args.requests.split(",")] if which != "dram" else [4]:
                    rows: dict[str, list[dict[str, float]]] = {e.name: [] for e in engines}
                    for again in range(args.rounds + 1):
                        for engine in engines[:: 1 if again % 2 else -1]:
                            figures = one(engine, which, count, len(found) * 1000 + again)
                            if again:
                                rows[engine.name].append(figures)
                    found[f"{which} {count}"] = rows
                    shown = "; ".join(
                        f"{name} "
                        + ", ".join(f"{k} {statistics.median(r[k] for r in each):.1f}" for k in each[0])
                        for name, each in rows.items()
                    )
                    print(f"{which:7} x {count:3} ({SCENARIOS[which]}): {shown}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1))
        finally:
            for engine in engines[1:]:
                engine.worker.shutdown()
                engine.scheduler.shutdown()
            cache.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

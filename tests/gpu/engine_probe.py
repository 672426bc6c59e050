"""One vLLM engine in this process, driven by JSON lines on stdin: engine_probe.py '{"model": .., "connector": true, ...}'

Answers are lines that begin with @@. Used by run_all.py, which holds a plain engine and one with pdserve side by side and asks
them in turn, so that both see the same machine.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_USE_FLASHINFER_SAMPLER="0", VLLM_ENABLE_V1_MULTIPROCESSING="0"
)
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}


def prompt(seed: int, n: int) -> dict[str, list[int]]:
    r = random.Random(seed)
    return {"prompt_token_ids": [r.randrange(100, 49000) for _ in range(n)]}


class Probe:
    def __init__(self, options: dict) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        more = {}
        if options.get("connector"):
            more["kv_transfer_config"] = KVTransferConfig(
                kv_connector="PdserveConnector",
                kv_connector_module_path="pdserve.engines.vllm.connector",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config={
                    "pdserve.socket": options["socket"],
                    "pdserve.instance": options["name"],
                    "pdserve.load": "always",  # what is measured here is loading, not the decision
                    **({"pdserve.payload": options["payload"]} if options.get("payload") else {}),
                },
            )
        elif options.get("peer") == "null":
            more["kv_transfer_config"] = KVTransferConfig(
                kv_connector="NullConnector", kv_connector_module_path="null_connector", kv_role="kv_both"
            )
        elif options.get("peer") == "offloading":
            more["kv_transfer_config"] = KVTransferConfig(
                kv_connector="OffloadingConnector",
                kv_role="kv_both",
                kv_connector_extra_config={"num_cpu_blocks": 8000, "cpu_bytes_to_use": 20 << 30},
            )
        elif options.get("peer") == "lmcache":
            os.environ.update(LMCACHE_LOCAL_CPU="true", LMCACHE_CHUNK_SIZE="256", LMCACHE_MAX_LOCAL_CPU_SIZE="20")
            more["kv_transfer_config"] = KVTransferConfig(kv_connector="LMCacheConnectorV1", kv_role="kv_both")
        arguments = {
            "load_format": options.get("load_format", "dummy"),
            "dtype": options.get("dtype", "bfloat16"),
            "max_model_len": options.get("max_model_len", 32768),
            "kv_cache_memory_bytes": options["kv_gib"] << 30,
            "gpu_memory_utilization": 0.3,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 8192,
            "seed": 0,
            "compilation_config": GRAPHS,
        }
        self.llm = LLM(options["model"], **{**arguments, **more, **options.get("engine", {})})
        self.side, self._timeline, self._arms, self._touching = None, None, None, None
        if options.get("connector"):
            from vllm.distributed.kv_transfer import get_kv_transfer_group

            self.side = get_kv_transfer_group()._worker
            self._watch()

    def _watch(self) -> None:
        """Keeps each job's time and what it loaded where."""
        loader, saver = self.side._loader, self.side._saver
        done, copy_in = loader._done, saver._copy_in
        self.loads, self.stores = [], []

        def loaded(job, result, unfilled):
            self.loads.append((job, result.seconds))
            done(job, result, unfilled)

        def timed_store(job, mark):
            start = time.perf_counter()
            copy_in(job, mark)
            self.stores.append((sum(c.tokens for c in job.chunks), time.perf_counter() - start))

        loader._done, saver._copy_in = loaded, timed_store

    # ---- commands ----

    def generate(self, seeds: list[int], n: int, out: int, texts: list[str] | None = None) -> dict:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=out, ignore_eos=texts is None)
        prompts = texts or [prompt(s, n) for s in seeds]
        start, cpu = time.perf_counter(), time.process_time()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return {
            "ms": seconds * 1e3,
            "cpu_ms": (time.process_time() - cpu) * 1e3,
            "tok_s": sum(len(o.outputs[0].token_ids) for o in outputs) / seconds,
            "cached": [o.num_cached_tokens for o in outputs],
            "tokens": [list(o.outputs[0].token_ids) for o in outputs]
            if texts
            else [list(outputs[0].outputs[0].token_ids)[:8]],
        }

    def timeline(self, seed: int, n: int) -> dict:
        """One token behind a prompt: where each millisecond of it goes."""
        if self._timeline is None:
            from timeline import Timeline

            self._timeline = Timeline(self.llm, self.side)
        prompts = prompt(seed, n)  # made before the clock runs
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        self._timeline.begin()
        outputs = self.llm.generate([prompts], params, use_tqdm=False)
        return {"phases": self._timeline.end(), "cached": outputs[0].num_cached_tokens}

    def connector(self, on: bool) -> dict:
        """Off: nothing is looked up, nothing stored; the rest of the connector runs on."""
        half = self.llm.llm_engine.engine_core.engine_core.scheduler.connector._scheduler
        half._finder._mode = "always" if on else "never"
        half._storing.__dict__.pop("job", None)
        if not on:
            half._storing.job = lambda *_: None
        return {}

    def store_arm(self, arm: str) -> dict:
        """How what is computed from now on is stored; see store_arms.py."""
        if self._arms is None:
            from store_arms import StoreArms

            self._arms = StoreArms(self.side)
        self.connector(arm != "idle")
        self._arms.choose(arm)
        return {}

    def one_context(self) -> dict:
        """From now on nothing touches the device but the engine's work (pdserve.engines.vllm.quick)."""
        if self.side is not None and self.side._quick is not None:
            self.side._quick.close()
            self.side._quick = None
        return {}

    def touch(self) -> dict:
        """The device switches to another context and back."""
        from pdserve.kernels.second_context import SecondContext

        if self._touching is None:
            self._touching = SecondContext(self.side._pages.parts[0]._device)
        self._touching.touch()
        return {}

    def about(self) -> dict:
        """What moves the KV."""
        return {"on_device": self.side._pages.on_device, "pages": self.side._pages.describe()}

    def kernels_alone(self, grids: list[int]) -> dict:
        if self._arms is None:
            self.store_arm("full")
        return self._arms.alone(grids)

    def settle(self) -> dict:
        """Waits until no save is under way."""
        end = time.monotonic() + 20
        while self.side is not None and self.side._saver._outstanding and time.monotonic() < end:
            time.sleep(0.005)
        # A step reports what has ended; ten tokens are too few to be stored themselves.
        self.generate([random.randrange(1 << 30)], 10, 3)
        return {}

    def reset(self) -> dict:
        for _ in range(20):
            if self.llm.reset_prefix_cache():
                return {"reset": True}
            self.settle()
        return {"reset": False}

    def watch_calls(self) -> dict:
        """From now on: how often vLLM calls each method of the connector, and the time in it. See calls()."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        self.called: dict[str, list[float]] = {}
        halves = {
            "worker": get_kv_transfer_group(),
            "scheduler": self.llm.llm_engine.engine_core.engine_core.scheduler.connector,
        }
        for half, connector in halves.items():
            for name in dir(connector):
                method = getattr(connector, name, None)
                if not name.startswith("_") and callable(method) and not isinstance(method, type):
                    setattr(connector, name, self._timed(f"{half} {name}", method))
        return {}

    def _timed(self, name: str, method):
        def call(*args, **kwargs):
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                entry = self.called.setdefault(name, [0, 0.0])
                entry[0] += 1
                entry[1] += time.perf_counter() - start

        return call

    def calls(self) -> dict:
        """Since the last time: {method: [calls, ms]}."""
        found, self.called = self.called, {}
        return {name: [n, s * 1e3] for name, (n, s) in sorted(found.items(), key=lambda x: -x[1][1])}

    def rates(self) -> dict:
        """Loads and stores since the last call: tokens, ms; clears."""
        loads = [(sum(c.tokens for c in j.chunks), s * 1e3) for j, s in self.loads]
        stores = [(t, s * 1e3) for t, s in self.stores]
        self.loads, self.stores = [], []
        return {"loads": loads, "stores": stores}

    def check_kv(self) -> dict:
        """The blocks that the last load filled, gathered again and compared with the arena, byte by byte."""
        import numpy as np
        import torch

        from pdserve.kernels import gpu
        from pdserve.transfer.staging import stride_of

        job, _ = self.loads[-1]
        pages, arena = self.side._pages.parts[0], self.side._client.arena
        equal = checked = 0
        for chunk in job.chunks:
            if any(b is None for b in chunk.block_ids):
                continue
            shard = pages.shard_bytes(chunk.tokens)
            stride = stride_of(shard)
            out = torch.full((pages.shard_count, stride), 0xA5, dtype=torch.uint8, device="cuda")
            torch.cuda.synchronize()
            pages._gpu.move(
                gpu.SAVE, pages._expand(chunk.block_ids, chunk.tokens), chunk.tokens, stride, out.data_ptr()
            )
            want = arena.bytes[chunk.offset : chunk.offset + pages.shard_count * stride].reshape(
                pages.shard_count, stride
            )
            checked += 1
            equal += _same(out.cpu().numpy()[:, :shard], np.asarray(want)[:, :shard], pages._geometry)
        return {"chunks": checked, "equal": equal}

    def itl(self, streams: int, out: int, disturb: str = "", seed: int = 0) -> dict:
        """Time between tokens of `streams` decoding requests.

        disturb: as movers.py has it; 20k tokens are moved to or from the arena all the time.
        """
        from movers import Beside
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=out, ignore_eos=True)
        for i in range(streams):
            engine.add_request(f"itl-{seed}-{i}-{disturb}", prompt(9000 + seed * 100 + i, 500), params)
        moving = Beside(self.side, disturb)
        last: dict[str, tuple[int, float]] = {}
        gaps: list[float] = []
        start = None
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for o in outputs:
                count = len(o.outputs[0].token_ids)
                before = last.get(o.request_id)
                if before and count > before[0]:
                    if before[0] >= 4:
                        gaps += [(now - before[1]) / (count - before[0])] * (count - before[0])
                    last[o.request_id] = (count, now)
                elif not before:
                    last[o.request_id] = (count, now)
            if start is None and len(last) == streams:
                start = now
                moving.start()
        seconds = time.perf_counter() - (start or 0)
        moving.stop()
        gaps.sort()
        pick = lambda q: gaps[min(len(gaps) - 1, int(len(gaps) * q))] * 1e3  # noqa: E731
        return {
            "p50": pick(0.5), "p95": pick(0.95), "p99": pick(0.99), "max": gaps[-1] * 1e3, "tokens": len(gaps),
            "stored_gb_s": moving.stored / seconds / 1e9, "loaded_gb_s": moving.loaded / seconds / 1e9,
        }  # fmt: skip

    def hits(self, streams: int, seeds: list[int], n: int, share: float, seed: int = 0) -> dict:
        """First tokens of prompts that come one after another while `streams` others decode, and the time between tokens of these.

        share: of the bus that a load may take, as engine.load_share.
        """
        from vllm import SamplingParams

        self.side._way._load_percent = round(100 * share)
        self.rates()
        engine, names = self.llm.llm_engine, [f"beside-{seed}-{i}" for i in range(streams)]
        forever = SamplingParams(temperature=0, max_tokens=20000, ignore_eos=True)
        for i, name in enumerate(names):
            engine.add_request(name, prompt(7000 + seed * 100 + i, 500), forever)
        one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        gaps: list[float] = []
        first: list[float] = []
        waiting = [(f"hit-{seed}-{s}", prompt(s, n)) for s in seeds]
        asked = last = 0.0
        rest = 30  # steps until the next one is sent
        while waiting or asked:
            outputs = engine.step()
            now = time.perf_counter()
            if last and any(o.request_id == names[0] for o in outputs):
                gaps.append((now - last) * 1e3)
            last = now
            if asked and any(o.finished for o in outputs):
                first.append((now - asked) * 1e3)
                asked, rest = 0.0, 30
            rest -= 1
            if not asked and waiting and rest <= 0:
                name, hit = waiting.pop(0)
                asked = time.perf_counter()
                engine.add_request(name, hit, one)
        engine.abort_request(names)
        engine.step()
        gaps.sort()
        loads = self.rates()["loads"]
        return {"first": first, "loads": loads, "p50": gaps[len(gaps) // 2], "mean": sum(gaps) / len(gaps), "max": gaps[-1]}


def _same(got, want, geometry) -> bool:
    """Byte by byte; with a rounded payload the values that they stand for (fp8 may say the same with another scale)."""
    if geometry.payload:
        from pdserve.kernels import rounded

        rows = geometry.stored_token_bytes
        got, want = (rounded.grow(x.reshape(-1, rows), geometry.payload, geometry.dtype) for x in (got, want))
    return bool((got == want).all())


def main() -> None:
    options = json.loads(sys.argv[1])
    start = time.time()
    probe = Probe(options)
    print("@@" + json.dumps({"ready": time.time() - start}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        try:
            answer = getattr(probe, name)(**command)
        except Exception as e:  # noqa: BLE001 - told to the driver
            import traceback

            traceback.print_exc()
            answer = {"error": f"{type(e).__name__}: {e}"}
        print("@@" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

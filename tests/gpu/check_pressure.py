"""What users must never notice: preemption for want of blocks, aborts, resets of the engine's cache, all at once.

    check_pressure.py --model DIR [--out FILE] [--requests 24] [--words 320] [--answer 128]    (under 2 minutes on a GPU)

A real small model in float32, in an engine with so few KV blocks that requests are preempted. Every answer that ends must have the
tokens that plain vLLM gives with blocks to spare (pressure_verdict.py says what else is allowed), and beside it runs a control: plain
vLLM with as few blocks, the same aborts and resets. In the end nothing may be left: no request, lease, save or block held.
Needs no GPU (use fewer requests there, and --one-by-one for the memory of one engine at a time).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from pressure_blocks import held, waiting

BLOCK = 32  # tokens; both a GPU and a CPU take it
#: Triton takes TF32 for float32's products unless it is told: a near tie then falls as the batch happens to be cut
EXACT = {"TRITON_F32_DEFAULT": "ieee", "VLLM_FLOAT32_MATMUL_PRECISION": "highest"}
SECONDS = 110.0
WAIT_S = 20.0  # at most, for blocks that somebody holds before a reset: ten times what all requests take on a GPU
WORDS = (
    "river", "harbour", "city", "winter", "letter", "engine", "garden", "paper", "window", "storm", "north", "silver", "market",
)  # fmt: skip


def prompts(count: int, words: int) -> list[str]:
    """Every third begins as the one before it, to share blocks and chunks."""
    r, texts = random.Random(7), []
    for i in range(count):
        text = " ".join(r.choice(WORDS) for _ in range(words // 2 + r.randrange(words)))
        texts.append(texts[-1] + " " + text[: len(text) // 3] if i % 3 == 2 else text)
    return texts


class Pressed:
    """An engine in this process, stepped by hand."""

    def __init__(self, options: dict) -> None:
        os.environ.update(
            EXACT,
            HF_HUB_OFFLINE="1",
            VLLM_NO_USAGE_STATS="1",
            VLLM_USE_FLASHINFER_SAMPLER="0",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
        )
        from engine_probe import GRAPHS
        from vllm import LLM, SamplingParams
        from vllm.config import KVTransferConfig

        more: dict = {"num_gpu_blocks_override": options["blocks"]} if options["arm"] != "plain" else {}
        if options["arm"] == "ours":
            extra = {"pdserve.socket": options["socket"], "pdserve.instance": "pressed", "pdserve.load": "always"}
            more["kv_transfer_config"] = KVTransferConfig(
                kv_connector="PdserveConnector", kv_connector_module_path="pdserve.engines.vllm.connector",
                kv_role="kv_both", kv_load_failure_policy="recompute", kv_connector_extra_config=extra,
            )  # fmt: skip
        self.llm = LLM(
            options["model"], dtype="float32", max_model_len=2048, max_num_seqs=16, max_num_batched_tokens=2048,
            block_size=BLOCK, seed=0, kv_cache_memory_bytes=1 << 30, gpu_memory_utilization=0.2,
            **({"enforce_eager": True} if options["eager"] else {"compilation_config": GRAPHS}), **more,
        )  # fmt: skip
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.params = SamplingParams(temperature=0, max_tokens=options["answer"], ignore_eos=True, logprobs=2)
        self.preempted, self.until = 0, time.monotonic() + SECONDS * options["patience"]
        self.patience, self.in_vain, self.reset_of = WAIT_S * options["patience"], set[str](), 0
        self._count_preemptions()

    def _count_preemptions(self) -> None:
        preempt = self.scheduler._preempt_request

        def counted(*args, **kwargs):
            self.preempted += 1
            return preempt(*args, **kwargs)

        self.scheduler._preempt_request = counted

    def add(self, name: str, text: str) -> None:
        self.engine.add_request(name, text, self.params)

    def finish(self, each_step=lambda n, answered: None) -> dict[str, dict]:
        """Steps until nothing is left to do: {request: tokens and logprobs} of those that came to their end."""
        self.answers: dict[str, dict] = {}
        steps = 0
        while self.engine.has_unfinished_requests():
            self.step()
            steps += 1
            each_step(steps, self.answers)
        return self.answers

    def step(self) -> None:
        if time.monotonic() > self.until:
            raise TimeoutError(f"{len(self.answers)} answers, and no end in sight; blocks: {held(self.scheduler)}")
        for output in self.engine.step():
            if output.finished and output.outputs[0].finish_reason != "abort":
                said = output.outputs[0]
                top = [[[token, found.logprob] for token, found in there.items()] for there in said.logprobs]
                self.answers[output.request_id] = {"tokens": list(said.token_ids), "top": top}

    def reset_while_running(self) -> dict[str, str] | None:
        """Running requests lose their blocks. vLLM refuses while a step is under way (with a connector and asynchronous scheduling it
        keeps back what that step may write to) and while blocks are held by requests that do not run (pressure_blocks.py): what can
        end is ended first. None: done; else who held what when vLLM refused."""
        from vllm.v1.core.sched.interface import PauseState

        def waits() -> bool:
            return any(request_id not in self.in_vain for request_id in waiting(self.scheduler))

        core, end = self.engine.engine_core.engine_core, time.monotonic() + self.patience
        try:
            while core.batch_queue or waits():  # the last step may end requests, too
                self.scheduler.set_pause_state(PauseState.UNPAUSED)
                while waits():
                    if time.monotonic() > end:
                        # A leak, perhaps: it is shown when vLLM refuses, and not waited for again.
                        self.in_vain |= waiting(self.scheduler).keys()
                    self.step()
                self.scheduler.set_pause_state(PauseState.PAUSED_ALL)
                while core.batch_queue:
                    self.step()
            before = self.preempted
            self.reset_of += len(self.scheduler.running)
            try:
                self.engine.reset_prefix_cache(reset_running_requests=True)
            except RuntimeError:
                return held(self.scheduler)
            finally:
                self.preempted = before  # only what was for want of blocks counts
            return None
        finally:
            self.scheduler.set_pause_state(PauseState.UNPAUSED)


def plain(options: dict) -> dict:
    engine = Pressed(options)
    for i, text in enumerate(options["texts"]):
        engine.add(str(i), text)
    return {"answers": [{"turn": "plain", "prompt": int(name), **answer} for name, answer in engine.finish().items()]}


class Check:
    """Three times the same prompts: computed, loaded from the cache, and after a reset that leaves the cache useless. The control
    has no cache to load from, and is otherwise treated the same."""

    def __init__(self, options: dict) -> None:
        self.engine, self.texts, self.port = Pressed(options), options["texts"], options["port"]
        self.answers: list[dict] = []
        self.aborted, self.resets = 0, 0
        self.refused: list[dict[str, str]] = []
        self.loaded: list[tuple[int, str]] = []
        self.side = self._watched_side() if options["arm"] == "ours" else None

    def _watched_side(self):
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        side = get_kv_transfer_group()._worker
        done = side._loader._done

        def loaded(job, result, unfilled):
            self.loaded.append((result.chunks, result.error))
            done(job, result, unfilled)

        side._loader._done = loaded
        return side

    def run(self) -> dict:
        engine, scheduler = self.engine.engine, self.engine.scheduler
        self.turn("cold", resets=False)
        self.settle()
        assert engine.reset_prefix_cache(), f"the engine's cache could not be emptied: {held(scheduler)}"
        before = len(self.loaded)
        self.turn("loaded", resets=True)
        loads = [x for x in self.loaded[before:] if x[0] and not x[1]]
        self.settle()
        assert engine.reset_prefix_cache(reset_connector=True), f"the caches could not be reset: {held(scheduler)}"
        self.turn("after a reset", resets=True)
        self.settle()
        return {
            "answers": self.answers, "preempted": self.engine.preempted, "aborted": self.aborted, "resets": self.resets,
            "running when reset": self.engine.reset_of, "resets refused by vLLM": len(self.refused),
            "blocks held when refused": self.refused, "left": self.left(),
            **({
                "loads": len(loads), "chunks loaded": sum(n for n, _ in loads),
                "loads that failed": [e for _, e in self.loaded if e and "gone" not in e],
            } if self.side else {}),
        }  # fmt: skip

    def turn(self, name: str, *, resets: bool) -> None:
        """All prompts at once, each fourth one a second time, which is aborted: at once, or after some steps."""
        doomed = {}
        for i, text in enumerate(self.texts):
            self.engine.add(f"{name}-{i}", text)
            if i % 4 == 1:
                doomed[f"{name}-doomed-{i}"] = (0, 1, 3, 12, 40)[i // 4 % 5]
                self.engine.add(f"{name}-doomed-{i}", text + " and then")

        def each_step(n: int, answered: dict) -> None:
            for request_id, step in list(doomed.items()):
                if n >= step:
                    del doomed[request_id]
                    self.aborted += request_id not in answered
                    self.engine.engine.abort_request([request_id])
            if resets and n in (25, 31, 45, 60, 61, 90):
                held_by = self.engine.reset_while_running()
                if held_by is None:
                    self.resets += 1
                else:
                    self.refused.append(held_by)

        for request_id, answer in self.engine.finish(each_step).items():
            if "doomed" not in request_id:
                self.answers.append({"turn": name, "prompt": int(request_id.rpartition("-")[2]), **answer})

    def settle(self) -> None:
        """Until no save is under way, and the scheduler has heard of it."""
        end = time.monotonic() + 30
        while self.side and self.side._saver._outstanding and time.monotonic() < end:
            time.sleep(0.005)
        self.engine.add(f"settle-{time.monotonic()}", "so")
        self.engine.finish()

    def left(self) -> dict:
        pool = self.engine.scheduler.kv_cache_manager.block_pool
        left = {
            "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(), "in the scheduler": len(self.engine.scheduler.requests),
        }  # fmt: skip
        if self.side is None:
            return left
        half = self.engine.scheduler.connector._scheduler
        status = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/status", timeout=10).read())
        return {
            **left, "tracked": len(half._requests), "saves": len(self.side._saver._outstanding), "loads": len(self.side._loading),
            "leases": status["leases"],
        }  # fmt: skip


def child(options: dict) -> None:
    found = plain(options) if options["arm"] == "plain" else Check(options).run()
    Path(options["file"]).write_text(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--words", type=int, default=320, help="of a prompt, on average (default %(default)s)")
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer (default %(default)s)")
    parser.add_argument(
        "--blocks", type=int, default=112, help=f"of {BLOCK} tokens that the engine has (default %(default)s)"
    )
    parser.add_argument("--one-by-one", action="store_true", help="never two engines at a time")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--patience", type=float, default=1.0, help="so many times as long for everything")
    parser.add_argument("--port", type=int, default=8098, help="of the cache daemon's admin page")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return 0
    from gpu_session import daemon
    from pressure_verdict import judge

    common = {
        "model": args.model, "answer": args.answer, "eager": args.eager, "patience": args.patience, "blocks": args.blocks,
        "port": args.port, "texts": prompts(args.requests, args.words),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        cache, socket = daemon(f"pressure{os.getpid()}", "2GiB", args.port, Path(folder))
        children: list[subprocess.Popen] = []
        try:
            for n, arm in enumerate(("plain", "control", "ours")):
                options = json.dumps({**common, "arm": arm, "socket": socket, "file": f"{folder}/{n}.json"})
                words = [sys.executable, "-P", __file__, "--model", args.model, "--child", options]
                children.append(subprocess.Popen(words, env={**os.environ, "VLLM_PORT": str(29100 + 100 * n)}))
                if args.one_by_one:
                    children[-1].wait(SECONDS * args.patience)
            for process in children:
                if process.wait(SECONDS * args.patience):
                    raise RuntimeError(f"an engine ended with {process.returncode}")
            wanted, control, found = (json.loads(Path(f"{folder}/{n}.json").read_text()) for n in range(3))
        finally:
            for process in children:
                process.kill()
                process.wait(20)
            cache.terminate()  # it takes its arena along
            try:
                cache.wait(20)
            except subprocess.TimeoutExpired:
                cache.kill()
    shown, wrong = judge(wanted["answers"], found, control)
    if args.out:
        args.out.write_text(json.dumps({**shown, "wrong": wrong}, indent=1))
    print(json.dumps(shown, indent=1))
    print("WRONG: " + "; ".join(wrong) if wrong else "all as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

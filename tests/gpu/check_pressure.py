"""What users must never notice: preemption for want of blocks, aborts, resets of the engine's cache, all at once.

    check_pressure.py --model DIR [--out FILE] [--requests 24] [--words 320] [--answer 128]    (under 2 minutes on a GPU)

A real small model in float32, in an engine with so few KV blocks that requests are preempted. Every answer that ends must have the
tokens that plain vLLM gives with blocks to spare. In the end nothing may be left: no request, lease, save or block held.
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

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
BLOCK = 32  # tokens; both a GPU and a CPU take it
SECONDS = 110.0
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
            HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_USE_FLASHINFER_SAMPLER="0", VLLM_ENABLE_V1_MULTIPROCESSING="0"
        )
        from engine_probe import GRAPHS
        from vllm import LLM, SamplingParams
        from vllm.config import KVTransferConfig

        more: dict = {}
        if options["socket"]:
            extra = {"pdserve.socket": options["socket"], "pdserve.instance": "pressed", "pdserve.load": "always"}
            more = {
                "kv_transfer_config": KVTransferConfig(
                    kv_connector="PdserveConnector", kv_connector_module_path="pdserve.engines.vllm.connector",
                    kv_role="kv_both", kv_load_failure_policy="recompute", kv_connector_extra_config=extra,
                ),
                "num_gpu_blocks_override": options["blocks"],
            }  # fmt: skip
        self.llm = LLM(
            options["model"], dtype="float32", max_model_len=2048, max_num_seqs=16, max_num_batched_tokens=2048,
            block_size=BLOCK, seed=0, kv_cache_memory_bytes=1 << 30, gpu_memory_utilization=0.2,
            **({"enforce_eager": True} if options["eager"] else {"compilation_config": GRAPHS}), **more,
        )  # fmt: skip
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.params = SamplingParams(temperature=0, max_tokens=options["answer"], ignore_eos=True)
        self.preempted, self.until = 0, time.monotonic() + SECONDS * options["patience"]
        self._count_preemptions()

    def _count_preemptions(self) -> None:
        preempt = self.scheduler._preempt_request

        def counted(*args, **kwargs):
            self.preempted += 1
            return preempt(*args, **kwargs)

        self.scheduler._preempt_request = counted

    def add(self, name: str, text: str) -> None:
        self.engine.add_request(name, text, self.params)

    def finish(self, each_step=lambda n, answered: None) -> dict[str, list[int]]:
        """Steps until nothing is left to do: {request: tokens} of those that came to their end."""
        self.answers: dict[str, list[int]] = {}
        steps = 0
        while self.engine.has_unfinished_requests():
            self.step()
            steps += 1
            each_step(steps, self.answers)
        return self.answers

    def step(self) -> None:
        if time.monotonic() > self.until:
            raise TimeoutError(f"{len(self.answers)} answers, and no end in sight")
        for output in self.engine.step():
            if output.finished and output.outputs[0].finish_reason != "abort":
                self.answers[output.request_id] = list(output.outputs[0].token_ids)

    def reset_while_running(self) -> None:
        """Running requests lose their blocks. vLLM refuses while a step is under way (asynchronous scheduling): that is ended first."""
        from vllm.v1.core.sched.interface import PauseState

        before, core = self.preempted, self.engine.engine_core.engine_core
        self.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        try:
            while core.batch_queue:
                self.step()
            self.engine.reset_prefix_cache(reset_running_requests=True)
        finally:
            self.scheduler.set_pause_state(PauseState.UNPAUSED)
            self.preempted = before  # only what was for want of blocks counts


def plain(options: dict) -> dict:
    engine = Pressed(options)
    for i, text in enumerate(options["texts"]):
        engine.add(str(i), text)
    return {"answers": engine.finish()}


class Check:
    """Three times the same prompts: computed, loaded from the cache, and after a reset that leaves the cache useless."""

    def __init__(self, options: dict) -> None:
        self.engine, self.texts, self.port = Pressed(options), options["texts"], options["port"]
        self.answers: list[tuple[int, list[int]]] = []
        self.aborted, self.resets, self.refused = 0, 0, 0
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        self.side = get_kv_transfer_group()._worker
        self.loaded: list[tuple[int, str]] = []
        done = self.side._loader._done

        def loaded(job, result, unfilled):
            self.loaded.append((result.chunks, result.error))
            done(job, result, unfilled)

        self.side._loader._done = loaded

    def run(self) -> dict:
        engine = self.engine.engine
        self.turn("cold", resets=False)
        self.settle()
        assert engine.reset_prefix_cache(), "the engine's cache could not be emptied"
        before = len(self.loaded)
        self.turn("loaded", resets=True)
        loads = [x for x in self.loaded[before:] if x[0] and not x[1]]
        self.settle()
        assert engine.reset_prefix_cache(reset_connector=True), "the engine's cache and ours could not be reset"
        self.turn("after a reset", resets=True)
        self.settle()
        return {
            "answers": self.answers, "preempted": self.engine.preempted, "aborted": self.aborted, "resets": self.resets,
            "resets refused by vLLM": self.refused, "loads": len(loads), "chunks loaded": sum(n for n, _ in loads),
            "loads that failed": [e for _, e in self.loaded if e and "gone" not in e],
            "left": self.left(),
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
                self.reset_while_running()

        for request_id, tokens in self.engine.finish(each_step).items():
            if "doomed" not in request_id:
                self.answers.append((int(request_id.rpartition("-")[2]), tokens))

    def reset_while_running(self) -> None:
        try:
            self.engine.reset_while_running()
            self.resets += 1
        except RuntimeError:  # vLLM's own: something is being loaded
            self.refused += 1

    def settle(self) -> None:
        """Until no save is under way, and the scheduler has heard of it."""
        end = time.monotonic() + 30
        while self.side._saver._outstanding and time.monotonic() < end:
            time.sleep(0.005)
        self.engine.add(f"settle-{time.monotonic()}", "so")
        self.engine.finish()

    def left(self) -> dict:
        half, pool = self.engine.scheduler.connector._scheduler, self.engine.scheduler.kv_cache_manager.block_pool
        status = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/status", timeout=10).read())
        return {
            "tracked": len(half._requests), "saves": len(self.side._saver._outstanding), "loads": len(self.side._loading),
            "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(), "leases": status["leases"],
            "in the scheduler": len(self.engine.scheduler.requests),
        }  # fmt: skip


def child(options: dict) -> None:
    found = Check(options).run() if options["socket"] else plain(options)
    Path(options["file"]).write_text(json.dumps(found))


def judge(wanted: dict[str, list[int]], found: dict) -> tuple[dict, list[str]]:
    """What is shown, and what is wrong. Pure."""
    equal = sum(tokens == wanted[str(i)] for i, tokens in found["answers"])
    counts = {k: v for k, v in found.items() if k not in ("answers", "left")}
    shown = {"answers": len(found["answers"]), "equal": equal, **counts, "left": found["left"]}
    shown["what"] = ", ".join(f"{k} {v}" for k, v in counts.items())
    wrong = [f"{k} are left: {n}" for k, n in found["left"].items() if n]
    wrong += [f"no {k}" for k in ("preempted", "aborted", "resets", "loads") if not found[k]]
    if len(found["answers"]) != 3 * len(wanted) or equal != len(found["answers"]):
        wrong.append(f"{equal} of {len(found['answers'])} answers are plain vLLM's, of {3 * len(wanted)} that were asked for")
    if found["loads that failed"]:
        wrong.append("a load failed")
    return shown, wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--words", type=int, default=320, help="of a prompt, on average (default %(default)s)")
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer (default %(default)s)")
    parser.add_argument("--blocks", type=int, default=112, help=f"of {BLOCK} tokens that the engine has (default %(default)s)")
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

    common = {
        "model": args.model, "answer": args.answer, "eager": args.eager, "patience": args.patience, "blocks": args.blocks,
        "port": args.port, "texts": prompts(args.requests, args.words),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        cache, socket = daemon(f"pressure{os.getpid()}", "2GiB", args.port, Path(folder))
        children: list[subprocess.Popen] = []
        try:
            for n, there in enumerate(("", socket)):
                options = json.dumps({**common, "socket": there, "file": f"{folder}/{n}.json"})
                words = [sys.executable, "-P", __file__, "--model", args.model, "--child", options]
                children.append(subprocess.Popen(words, env={**os.environ, "VLLM_PORT": str(29100 + 100 * n)}))
                if args.one_by_one:
                    children[-1].wait(SECONDS * args.patience)
            for process in children:
                if process.wait(SECONDS * args.patience):
                    raise RuntimeError(f"an engine ended with {process.returncode}")
            wanted, found = (json.loads(Path(f"{folder}/{n}.json").read_text()) for n in (0, 1))
        finally:
            for process in children:
                process.kill()
                process.wait(20)
            cache.terminate()  # it takes its arena along
            try:
                cache.wait(20)
            except subprocess.TimeoutExpired:
                cache.kill()
    shown, wrong = judge(wanted["answers"], found)
    if args.out:
        args.out.write_text(json.dumps({**shown, "wrong": wrong}, indent=1))
    print(json.dumps(shown, indent=1))
    print("WRONG: " + "; ".join(wrong) if wrong else "all as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The two speeds of a CUDA graph on one device: python tests/gpu/bench_two_speeds.py   (no vLLM; half a minute)

A graph of 600 small kernels is replayed: as the process begins, after another process has made a CUDA context on the device and
ended, and after large matrix products; then with a second context of this process, touched never, each second, each 100 ms. Each
line: ms of one replay, the median of 60; beside touches also the mean and the slowest hundredth.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from itertools import pairwise

import torch

from pdserve.kernels.second_context import SecondContext

OTHER = "import torch; torch.zeros(1, device='cuda'); torch.cuda.synchronize()"
KERNELS, REPLAYS, TRIALS = 600, 60, 5


def captured() -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """One product of a few rows, as in decoding, and two element-wise kernels, over and over. The tensors must be kept."""
    rows = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(12)]

    def work() -> torch.Tensor:
        out = rows
        for i in range(KERNELS):
            out = torch.nn.functional.silu(out) if i % 3 else out @ weights[i % 12]
        return out

    with torch.cuda.stream(torch.cuda.Stream()):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        last = work()
    return graph, [rows, *weights, last]


def replays(graph: torch.cuda.CUDAGraph) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    return statistics.median(replays(graph))


def another_process() -> None:
    subprocess.run([sys.executable, "-c", OTHER], check=True, timeout=120)


def touched(graph: torch.cuda.CUDAGraph, context: SecondContext, every: float) -> str:
    """Some seconds of replays beside touches, `every` so many seconds (0: none)."""
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(every):
            context.touch()

    toucher = threading.Thread(target=touch, daemon=True)
    if every:
        toucher.start()
    each: list[float] = []
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        each += replays(graph)
    stop.set()
    if every:
        toucher.join(5)
    each.sort()
    return f"{statistics.median(each):.4f} ms, mean {statistics.mean(each):.4f}, p99 {each[int(len(each) * 0.99)]:.4f}"


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    torch.cuda.set_stream(torch.cuda.Stream())
    graph, _kept = captured()
    left, right = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((8192, 4096), (4096, 12288)))
    print(f"fresh: {replayed(graph):.4f} ms, again {replayed(graph):.4f}", flush=True)
    for trial in range(TRIALS):
        another_process()
        quick = replayed(graph)
        for _ in range(50):
            left @ right
        print(f"{trial}: after another process {quick:.4f} ms, after large products {replayed(graph):.4f}", flush=True)
    context = SecondContext(torch.cuda.current_device())
    print(f"a second context, untouched: {replayed(graph):.4f} ms", flush=True)
    context.touch()
    for every in (0.0, 1.0, 0.1):
        print(f"touched once, then each {every:g} s (0: no more): {touched(graph, context, every)}", flush=True)
    context.close()


if __name__ == "__main__":
    main()

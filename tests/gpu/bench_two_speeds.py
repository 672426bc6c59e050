"""The two speeds of a CUDA graph on one device: python tests/gpu/bench_two_speeds.py   (torch alone; half a minute)

A graph of 600 small kernels is replayed: as the process begins, after another process has made a CUDA context on the device and
ended, and after large matrix products. Each line: ms of one replay, the median of 60.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from itertools import pairwise

import torch

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


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events))


def another_process() -> None:
    subprocess.run([sys.executable, "-c", OTHER], check=True, timeout=120)


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


if __name__ == "__main__":
    main()

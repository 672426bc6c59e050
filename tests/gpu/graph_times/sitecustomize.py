"""How long the device takes for each replay of a decoding step's CUDA graph, and how long from its end to the next one's start.

Python imports a module of this name by itself: put this folder first in PYTHONPATH of an engine, and GRAPH_TIMES names the file,
a line for each second: Unix time, replays, medians in ms of: graph, between graphs, from call to call on the host; percent of the
replays whose predecessor had not ended when they were called (the host is ahead of the device).
"""

import os
import sys


class _Patch:
    """Waits for vLLM's runner to be imported; by then torch has been."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "vllm.v1.worker.gpu.model_runner":
            sys.meta_path.remove(self)
            watch(os.environ["GRAPH_TIMES"])


def watch(file: str) -> None:
    import statistics
    import time
    from collections import deque

    import torch

    own = torch.cuda.CUDAGraph.replay
    seen: deque = deque()  # (begin, end, called, whether the one before was still running)
    rows: list = []
    told = [time.monotonic()]
    out = open(f"{file}-{os.getpid()}", "w", buffering=1)  # noqa: SIM115 - open as long as the process

    def replay(graph: object) -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        called = time.perf_counter()
        behind = bool(seen) and not seen[-1][1].query()
        begin.record()
        own(graph)
        end.record()
        seen.append((begin, end, called, behind))
        while len(seen) > 8:
            (b0, e0, c0, _), (b1, _, c1, behind1) = seen.popleft(), seen[0]
            if e0.query() and b1.query():
                rows.append((b0.elapsed_time(e0), e0.elapsed_time(b1), (c1 - c0) * 1e3, 100.0 * behind1))
        if time.monotonic() > told[0] + 1 and len(rows) > 20:
            told[0] = time.monotonic()
            graph_ms, between, calls = (statistics.median(r[i] for r in rows) for i in range(3))
            ahead = statistics.mean(r[3] for r in rows)
            out.write(f"{time.time():.1f} {len(rows)} {graph_ms:.4f} {between:.4f} {calls:.4f} {ahead:.0f}\n")
            rows.clear()

    torch.cuda.CUDAGraph.replay = replay


if os.environ.get("GRAPH_TIMES"):
    sys.meta_path.insert(0, _Patch())  # type: ignore[arg-type]

"""KV from one GPU to another, beside the way through the host: bench_peer.py OUT.json   (two GPUs, torch; no vLLM, 1 minute)

2.95 GB, 20000 tokens of Qwen3-8B in bf16: one copy over NVLink, the same in chunks of 256 tokens (as chunks are committed), and
host memory in between: down and up again one after the other, and overlapped chunk by chunk, which is what pdserve does. From
these follows what a direct copy could save of a handover, at most: the host's copy is made in any case, for later prompts.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch

TOKENS, TOKEN_BYTES, CHUNK = 20000, 144 << 10, 256
results: dict[str, object] = {}


def note(name: str, work, times: int = 5) -> None:
    found = []
    for again in range(times + 1):
        for device in (0, 1):
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        for device in (0, 1):
            torch.cuda.synchronize(device)
        if again:
            found.append(time.perf_counter() - start)
    seconds = statistics.median(found)
    results[name] = {"ms": seconds * 1e3, "gb_s": TOKENS * TOKEN_BYTES / seconds / 1e9}
    print(f"{name:50} {seconds * 1e3:8.2f} ms {TOKENS * TOKEN_BYTES / seconds / 1e9:7.1f} GB/s", flush=True)
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1))


def main() -> None:
    if torch.cuda.device_count() < 2:
        raise SystemExit("two GPUs are needed")
    results["peer_access"] = bool(torch.cuda.can_device_access_peer(0, 1))
    size = TOKENS * TOKEN_BYTES
    a = torch.empty(size, dtype=torch.uint8, device="cuda:0")
    b = torch.empty(size, dtype=torch.uint8, device="cuda:1")
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    cuts = [slice(at, min(at + CHUNK * TOKEN_BYTES, size)) for at in range(0, size, CHUNK * TOKEN_BYTES)]
    down, up = torch.cuda.Stream(0), torch.cuda.Stream(1)

    def chunked() -> None:
        for cut in cuts:
            b[cut].copy_(a[cut], non_blocking=True)

    def through_host() -> None:
        host.copy_(a, non_blocking=True)
        torch.cuda.synchronize(0)
        b.copy_(host, non_blocking=True)

    def overlapped() -> None:
        for cut in cuts:
            with torch.cuda.stream(down):
                host[cut].copy_(a[cut], non_blocking=True)
                arrived = down.record_event()
            with torch.cuda.stream(up):
                up.wait_event(arrived)
                b[cut].copy_(host[cut], non_blocking=True)

    note("GPU to GPU, one copy", lambda: b.copy_(a, non_blocking=True))
    note("GPU to GPU, a copy a chunk", chunked)
    note("GPU to host", lambda: host.copy_(a, non_blocking=True))
    note("host to GPU", lambda: b.copy_(host, non_blocking=True))
    note("through the host, one after the other", through_host)
    note("through the host, chunk by chunk", overlapped)


if __name__ == "__main__":
    main()

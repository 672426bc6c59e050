"""Bytes between paged KV and the arena: bench_copies.py OUT.json   (a GPU, torch, nvcc or NVRTC; no vLLM)

PDSERVE_KERNELS=nvcc or nvrtc says who compiles.

One line a case: ms and GB/s for 20000 tokens of Qwen3-8B's KV (36 layers, 8 heads of 128, bf16, blocks of 16 tokens, scattered),
beside the pinned-copy ceilings measured in the same run. Compares three ways: the kernel writing host memory itself, gather
into device staging and one DMA a chunk (what pdserve uses), and the driver's batched copies of whole blocks.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from pdserve.engines.vllm import device_layout
from pdserve.kernels import gpu
from pdserve.transfer import arena as arenas
from pdserve.transfer.staging import DevicePages, stride_of

LAYERS, HEADS, HEAD, BLOCK, BLOCKS = 36, 8, 128, 16, 3000
TOKENS, CHUNK = 20000, 256
results: dict[str, object] = {}


def note(name: str, seconds: list[float], nbytes: int) -> float:
    best, middle = min(seconds), statistics.median(seconds)
    results[name] = {
        "ms_median": middle * 1e3,
        "ms_best": best * 1e3,
        "gb_s": nbytes / middle / 1e9,
        "runs": len(seconds),
    }
    print(f"{name:46} {middle * 1e3:8.2f} ms {nbytes / middle / 1e9:7.2f} GB/s", flush=True)
    return nbytes / middle / 1e9


def timed(work, times: int = 7) -> list[float]:
    work()
    out = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        out.append(time.perf_counter() - start)
    return out


def ceilings(host: torch.Tensor, device: torch.Tensor) -> None:
    pinned = torch.empty(device.numel(), dtype=torch.uint8, pin_memory=True)
    for name, memory in (("pinned", pinned), ("arena", host)):
        for way, to, source in (("h2d", device, memory), ("d2h", memory, device)):
            note(f"copy {name} {way}", timed(lambda t=to, s=source: t.copy_(s, non_blocking=True)), device.numel())


def batched(layers: list[torch.Tensor], host: int, blocks: list[int], to_host: bool) -> None:
    """cudaMemcpyBatchAsync of whole blocks: no digest, no canonical layout; how far the copy engines get by themselves."""
    cudart = ctypes.CDLL("libcudart.so.13")
    size = BLOCK * HEADS * 2 * HEAD * 2
    device = np.array([t.data_ptr() + b * size for t in layers for b in blocks], np.uint64)
    there = np.arange(len(device), dtype=np.uint64) * size + host
    sizes = np.full(len(device), size, np.uint64)
    attributes = np.array([1, 0, 0, 0, 0, 0], np.int32)  # source read in stream order, no hints
    first = np.zeros(1, np.uint64)
    stream = torch.cuda.Stream()
    to, source = (there, device) if to_host else (device, there)

    def run() -> None:
        code = cudart.cudaMemcpyBatchAsync(
            ctypes.c_void_p(to.ctypes.data),
            ctypes.c_void_p(source.ctypes.data),
            ctypes.c_void_p(sizes.ctypes.data),
            ctypes.c_size_t(len(device)),
            ctypes.c_void_p(attributes.ctypes.data),
            ctypes.c_void_p(first.ctypes.data),
            ctypes.c_size_t(1),
            ctypes.c_void_p(stream.cuda_stream),
        )
        if code:
            raise RuntimeError(f"cudaMemcpyBatchAsync: {code}")

    note(f"(c) batched copies {'d2h' if to_host else 'h2d'}", timed(run, 5), len(device) * size)


def main() -> None:
    rng = np.random.default_rng()
    layers = [
        torch.randn(BLOCKS, BLOCK, HEADS, 2 * HEAD, device="cuda", dtype=torch.bfloat16).permute(0, 2, 1, 3)
        for _ in range(LAYERS)
    ]

    class Spec:
        block_size, real_page_size_bytes = BLOCK, BLOCK * HEADS * 2 * HEAD * 2

    order = {"block": 0, "head": 1, "token": 2, "content": 3}
    geometry, _ = device_layout.geometry_of(layers, order, Spec, BLOCKS, HEADS)
    arch = device_layout.arch_of(0)
    start = time.perf_counter()
    results["kernels"] = gpu.library(arch).how
    results["build_s"] = time.perf_counter() - start
    print(f"kernels {results['kernels']}, ready after {results['build_s']:.1f} s", flush=True)
    arena = arenas.create(Path("/dev/shm/pdserve-bench.arena"), 4 << 30)
    try:
        measure(rng, layers, geometry, arch, arena)
    finally:
        arena.path.unlink()
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1))


def rounding(payload, arena, geometry, arch, cuts, ids, back) -> None:
    """The same 20000 tokens in 8 bits a value; the bytes of the engine's cache count."""
    small = device_layout.rounded(geometry, payload, "bfloat16")
    area = HEADS * stride_of(small.shard_bytes(CHUNK))
    device = gpu.Gpu(arch, 0, small, area)

    def through(lane: int, blocks: list[int]):
        def run() -> list[list[int]]:
            chunks = []
            for n, (at, tokens) in enumerate(cuts):
                some = blocks[at // BLOCK : -(-(at + tokens) // BLOCK)]
                chunks.append((some, tokens, stride_of(small.shard_bytes(tokens)), arena.bytes.ctypes.data + n * area))
            tickets = device.submit(lane, None, chunks)
            device.wait(lane, tickets[-1])
            return [device.digests(lane, t, c[1]) for t, c in zip(tickets, chunks, strict=True)]

        return run

    nbytes = HEADS * geometry.shard_bytes(TOKENS)
    note(f"store as {payload}", timed(through(gpu.SAVE, ids)), nbytes)
    note(f"load as {payload}", timed(through(gpu.LOAD, back)), nbytes)
    results[f"equal {payload}"] = through(gpu.SAVE, ids)() == through(gpu.LOAD, back)()
    device.close()


def measure(rng, layers, geometry, arch, arena) -> None:
    ids = rng.permutation(BLOCKS)[: TOKENS // BLOCK].tolist()
    back = rng.permutation(BLOCKS)[: TOKENS // BLOCK].tolist()
    cuts = [(i, min(CHUNK, TOKENS - i)) for i in range(0, TOKENS, CHUNK)]
    area = HEADS * stride_of(geometry.shard_bytes(CHUNK))
    payload = HEADS * geometry.shard_bytes(TOKENS)
    pages = DevicePages(geometry, arch=arch, device=0, first_shard=0, stores=True, current_stream=lambda: 0)
    start = time.perf_counter()
    pages.attach(arena, CHUNK)
    results["register_s_per_gib"] = (time.perf_counter() - start) / 4
    device = pages._gpu
    host = torch.from_numpy(arena.bytes)
    staging = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    ceilings(host[: 2 << 30], staging)

    def through(blocks: list[int], store: bool):
        def run() -> list[list[int]]:
            copies = []
            for n, (at, tokens) in enumerate(cuts):
                part = arena.bytes[n * area : n * area + area]
                stride = stride_of(geometry.shard_bytes(tokens))
                some = blocks[at // BLOCK : -(-(at + tokens) // BLOCK)]
                copies.append(
                    pages.store(None, some, tokens, part, stride)
                    if store
                    else pages.load(None, part, some, tokens, stride)
                )
            return [c.digests() for c in copies]

        return run

    note("(b) store: gather, staging, DMA, digest made", timed(through(ids, True)), payload)
    note("(b) load: DMA, staging, scatter, digest checked", timed(through(back, False)), payload)
    stored, loaded = through(ids, True)(), through(back, False)()
    same = all(torch.equal(t[ids], t[back]) for t in layers) or stored == loaded
    results["equal"] = bool(stored == loaded and same)
    print("digests equal:", stored == loaded, flush=True)

    for small in ("int8", "fp8"):
        rounding(small, arena, geometry, arch, cuts, ids, back)

    one, stride = ids[: CHUNK // BLOCK], stride_of(geometry.shard_bytes(CHUNK))
    size = HEADS * geometry.shard_bytes(CHUNK)
    for grid in (8, 16, 32, 132, 528):
        for lane, name in ((gpu.SAVE, "gather"), (gpu.LOAD, "scatter")):
            work = lambda m, n=lane, g=grid: device.move(n, one, CHUNK, stride, m, g)  # noqa: E731
            note(f"kernel alone {name}, {grid} thread blocks", timed(lambda w=work: w(staging.data_ptr())), size)
            note(
                f"(a) kernel {name} on host memory, {grid} blocks",
                timed(lambda w=work: w(arena.bytes.ctypes.data)),
                size,
            )
    for grid in (32, 132):
        for depth in (2, 3):
            pages._gpu = gpu.Gpu(arch, 0, geometry, area, depth=depth, blocks=grid)
            note(f"(b) store, {grid} blocks, {depth} buffers", timed(through(ids, True), 3), payload)
            note(f"(b) load, {grid} blocks, {depth} buffers", timed(through(back, False), 3), payload)
            pages._gpu.close()
    pages._gpu = device
    for to_host in (True, False):
        try:
            batched(layers, arena.bytes.ctypes.data, ids, to_host)
        except (OSError, RuntimeError, AttributeError) as e:
            results[f"batched_{to_host}"] = str(e)
            print(e)
    pages.close()


if __name__ == "__main__":
    main()

"""Ways to store, to be compared inside one engine (engine_probe.py): each leaves out or changes one part of what a store does.

What the arms without a gather or without a copy store is garbage under keys of random prompts: nobody loads it.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from pdserve.kernels import gpu
from pdserve.transfer.staging import DevicePages, Done, Part


class StoreArms:
    """Of one engine's worker half. An arm is "full" or "idle" (as it is; nothing stored), "nothing" (all of the host's work,
    nothing on the device), "copies" (DMA of whatever is staged), "gathers:N" (only the kernel, N thread blocks), "pieces:N" (the
    engine's own copies are let in after each N MiB; 0: after a chunk), "dma:N" (N thread blocks; a third number: so many buffers)."""

    def __init__(self, side: Any) -> None:
        self._pages = side._pages.parts[0]
        self._own = {
            name: getattr(self._pages, name) for name in ("store_all", "_gpu") if hasattr(self._pages, name)
        }
        self._devices: dict[tuple[int, ...], gpu.Gpu] = {}
        self._stream: Any = None
        self._staged: Any = None

    def choose(self, arm: str) -> None:
        pages = self._pages
        pages.__dict__.pop("store_all", None)
        if "_gpu" in self._own:
            pages._gpu = self._own["_gpu"]
        kind, *sizes = arm.split(":")
        if kind in ("full", "idle"):
            return
        if kind == "nothing":
            pages.store_all = self._nothing
            return
        if not isinstance(pages, DevicePages):
            raise RuntimeError(f"{arm} needs a device")
        if kind == "pieces":
            mib = int(sizes[0])
            pages.store_all = lambda mark, parts, piece: self._own["store_all"](mark, parts, mib << 20)
        elif kind == "dma":
            pages._gpu = self._device(*map(int, sizes))
        elif kind == "gathers":
            device = self._device(*map(int, sizes))
            pages.store_all = lambda mark, parts, piece: self._gathers(device, mark, parts)
        elif kind == "copies":
            self._open()
            pages.store_all = self._copies
        else:
            raise ValueError(f"no such arm: {arm}")

    def alone(self, grids: Sequence[int], tokens: int = 256) -> dict[str, float]:
        """ms of one chunk's kernel with nothing beside it, waited for; the last entry is of a kernel with next to nothing to do."""
        pages = self._pages
        stride = pages.shard_bytes(tokens)
        self._open()
        count = -(-tokens // pages._geometry.block_tokens)
        ids = [pages._geometry.num_blocks - 1 - i for i in range(count)]
        found = {}
        for lane, name in ((gpu.SAVE, "gather"), (gpu.LOAD, "scatter")):
            for grid in grids:
                found[f"{name}:{grid}"] = self._median(lane, ids, tokens, stride, grid)
        found["launch and wait"] = self._median(gpu.SAVE, ids[:1], 1, stride, 8)
        return found

    def _median(self, lane: int, ids: list[int], tokens: int, stride: int, grid: int) -> float:
        def once() -> float:
            start = time.perf_counter()
            self._own["_gpu"].move(lane, ids, tokens, stride, self._staged.data_ptr(), grid)
            return (time.perf_counter() - start) * 1e3

        return statistics.median([once() for _ in range(30)][5:])

    def close(self) -> None:
        self.choose("full")
        for device in self._devices.values():
            device.close()
        self._devices.clear()

    # ---- the ways ----

    def _device(self, blocks: int, depth: int = 3) -> gpu.Gpu:
        """Lanes of their own, with another grid."""
        if (blocks, depth) not in self._devices:
            p = self._pages
            self._devices[blocks, depth] = gpu.Gpu(
                p._arch, p._device, p._geometry, p._staging_bytes, blocks=blocks, depth=depth
            )
        return self._devices[blocks, depth]

    def _open(self) -> None:
        if self._stream is None:
            torch.cuda.set_device(self._pages._device)
            self._stream = torch.cuda.Stream(priority=0)
            self._staged = torch.zeros(self._pages._staging_bytes, dtype=torch.uint8, device="cuda")
            torch.cuda.synchronize()

    def _nothing(self, mark: Any, parts: Sequence[Part], piece: int) -> list[Any]:
        return [Done([0] * self._pages.shard_count) for _ in parts]

    def _copies(self, mark: Any, parts: Sequence[Part], piece: int) -> list[Any]:
        torch.cuda.set_device(self._pages._device)
        after(self._stream, mark)
        moved = []
        with torch.cuda.stream(self._stream):
            for _, _, area, _ in parts:
                torch.from_numpy(area).copy_(self._staged[: area.size], non_blocking=True)
                event = torch.cuda.Event(blocking=True)
                event.record()
                moved.append(_Copied(event, self._pages.shard_count))
        if len(moved) >= 3:
            moved[-3].digests()  # as many under way as there are buffers
        return moved

    def _gathers(self, device: gpu.Gpu, mark: Any, parts: Sequence[Part]) -> list[Any]:
        self._open()
        torch.cuda.set_device(self._pages._device)
        after(self._stream, mark)
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        event.synchronize()
        digests = []
        for ids, tokens, _, stride in parts:
            some = self._pages._expand(ids, tokens)
            digests.append(device.move(gpu.SAVE, some, tokens, stride, self._staged.data_ptr()))
        return [Done(d) for d in digests]


class _Copied:
    def __init__(self, event: Any, shards: int) -> None:
        self._event, self._shards = event, shards

    def done(self) -> bool:
        return bool(self._event.query())

    def digests(self) -> list[int]:
        self._event.synchronize()
        return [0] * self._shards


def after(stream: Any, mark: Any) -> None:
    """What `stream` gets from now on waits for the mark."""
    if mark is None:
        return
    wait = ctypes.CDLL("libcuda.so.1").cuStreamWaitEvent
    code = wait(ctypes.c_void_p(stream.cuda_stream), ctypes.c_void_p(mark.handle), 0)
    if code:
        raise RuntimeError(f"cuStreamWaitEvent: {code}")

"""What moves 20k tokens beside an engine's steps (engine_probe.itl): as the engine does, or with a part of that left out.

A way is "store" or "load", a kind and a number, two of them with "+" between:

    store:turns:1    as the engine stores, giving way to loads (MiB between which others may copy)
    load:share:60    as the engine loads beside answers (percent of the bus)
    store:piece:8    never giving way (MiB)
    load:dma:528     all of it at once (thread blocks of a kernel)
    load:copies:0    DMA and no kernel
    load:kernel:0    kernels and no DMA
    load:torch:0     no more than small kernels of torch's on another stream
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pdserve.engines.vllm.giving_way import SEVERAL, GivingWay
from pdserve.kernels import gpu
from pdserve.transfer import wire
from pdserve.transfer.staging import stride_of

CHUNKS, TOKENS = 79, 256
RPC_S, END_S = 5.0, 20.0


@dataclass(frozen=True)
class Work:
    """What is moved: `chunks` as Gpu.submit takes them, `areas` their bytes in the arena. `way`: the engine's own."""

    load: bool
    size: int
    pages: Any
    chunks: list[gpu.Chunk]
    areas: list[Any]
    way: GivingWay

    @property
    def lane(self) -> int:
        return gpu.LOAD if self.load else gpu.SAVE


class Mover(Protocol):
    def once(self) -> None:
        """Moves all of it, and waits."""

    def close(self) -> None: ...


def nobody() -> bool:
    return False


class OnLanes:
    """Lanes of its own: those of the engine have one thread each."""

    def __init__(self, work: Work, **more: Any) -> None:
        p = work.pages
        self.work = work
        self.device = gpu.Gpu(p._arch, p._device, p._geometry, p._staging_bytes, **more)

    def close(self) -> None:
        self.device.close()


class AtOnce(OnLanes):
    def __init__(self, work: Work, piece: int = 0, **more: Any) -> None:
        super().__init__(work, **more)
        self._piece = piece

    def once(self) -> None:
        work = self.work
        if work.load:
            work.way.loading(True)
        self.device.wait(work.lane, self.device.submit(work.lane, None, work.chunks, self._piece)[-1])
        if work.load:
            work.way.loading(False)


class Turns(OnLanes):
    def once(self) -> None:
        work, last = self.work, 0
        for some, _ in work.way.stores(work.chunks, work.pages.together, nobody):
            last = self.device.submit(work.lane, None, some, work.size << 20)[-1]
        self.device.wait(work.lane, last)


class Share(OnLanes):
    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._shared = GivingWay(work.size / 100)
        self._shared.answers = SEVERAL

    def once(self) -> None:
        work, last = self.work, 0
        work.way.loading(True)
        for some, share in self._shared.loads(work.chunks, work.pages.together, nobody):
            last = self.device.submit(work.lane, None, some, share=share)[-1]
        self.device.wait(work.lane, last)
        work.way.loading(False)


class Kernels(OnLanes):
    def __init__(self, work: Work) -> None:
        super().__init__(work)
        import torch

        self._staged = torch.zeros(work.pages._staging_bytes, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()

    def once(self) -> None:
        for ids, tokens, stride, _ in self.work.chunks:
            self.device.move(self.work.lane, ids, tokens, stride, self._staged.data_ptr())


class Copies:
    """Between the arena and three staging buffers, as loads or stores submit it."""

    def __init__(self, work: Work) -> None:
        import torch

        self._work = work
        self._stream = torch.cuda.Stream(priority=-1 if work.load else 0)
        self._staged = [torch.zeros(work.pages._staging_bytes, dtype=torch.uint8, device="cuda") for _ in range(3)]
        torch.cuda.synchronize()

    def once(self) -> None:
        import torch

        load, ends = self._work.load, []
        torch.cuda.set_device(self._work.pages._device)
        with torch.cuda.stream(self._stream):
            for n, area in enumerate(self._work.areas):
                if n >= len(self._staged):
                    ends[n - len(self._staged)].synchronize()
                host, device = torch.from_numpy(area), self._staged[n % len(self._staged)][: area.size]
                (device if load else host).copy_(host if load else device, non_blocking=True)
                ends.append(torch.cuda.Event(blocking=True))
                ends[-1].record()
        ends[-1].synchronize()

    def close(self) -> None:
        self._staged.clear()


class SmallKernels:
    """A thousand times a second."""

    def __init__(self, work: Work) -> None:
        import torch

        torch.cuda.set_device(work.pages._device)
        self._stream, self._numbers = torch.cuda.Stream(), torch.zeros(1 << 20, device="cuda")
        torch.cuda.synchronize()

    def once(self) -> None:
        import torch

        with torch.cuda.stream(self._stream):
            self._numbers.add_(1)
        self._stream.synchronize()
        time.sleep(0.001)

    def close(self) -> None:
        del self._numbers


KINDS: dict[str, Callable[[Work], Mover]] = {
    "turns": Turns,
    "share": Share,
    "piece": lambda work: AtOnce(work, piece=work.size << 20),
    "dma": lambda work: AtOnce(work, blocks=work.size),
    "copies": Copies,
    "kernel": Kernels,
    "torch": SmallKernels,
}


def reserved(side: Any, load: bool, size: int) -> tuple[Work, list[int]]:
    """Room in the arena, and blocks at the end of the engine's cache, which nobody uses; with the reservations to give back."""
    pages, arena = side._pages.parts[0], side._client.arena
    shard, heads = pages.shard_bytes(TOKENS), pages.shard_count
    stride, blocks = stride_of(shard), TOKENS // pages._geometry.block_tokens
    items = [wire.ReserveItem(os.urandom(32), b"", 0, heads, shard, TOKENS, count=heads) for _ in range(CHUNKS)]
    grants = side._client.reserve("bench", items, RPC_S)
    areas = [arena.bytes[g.offset : g.offset + heads * stride] for g in grants]
    top = pages._geometry.num_blocks - 1 - CHUNKS * blocks * load
    ids = [[top - blocks * n - i for i in range(blocks)] for n in range(CHUNKS)]
    chunks: list[gpu.Chunk] = [(i, TOKENS, stride, a.ctypes.data) for i, a in zip(ids, areas, strict=True)]
    return Work(load, size, pages, chunks, areas, side._way), [g.reservation for g in grants]


class Beside:
    """All of one `how`, without a pause from start() to stop(), each way on a thread of its own. `side`: the worker's half."""

    def __init__(self, side: Any, how: str) -> None:
        self.stored = self.loaded = 0  # bytes
        self._client, self._stop = side._client if how else None, threading.Event()
        self._reservations: list[int] = []
        self._threads: list[threading.Thread] = []
        self._failed: list[Exception] = []
        for part in how.split("+") if how else ():
            way, kind, size = part.split(":")
            work, reservations = reserved(side, way == "load", int(size))
            self._reservations += reservations
            self._threads.append(threading.Thread(target=self._run, args=(work, KINDS[kind](work)), daemon=True))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Waits until nothing is moved any more, and gives everything back. Raises where a mover failed, or does not end: then its
        room in the arena stays its own."""
        self._stop.set()
        for thread in self._threads:
            if thread.ident:
                thread.join(END_S)
            if thread.is_alive():
                raise RuntimeError(f"what is moved beside the engine did not end within {END_S:g} s")
        if self._reservations:
            self._client.abort(self._reservations, RPC_S)
        if self._failed:
            raise RuntimeError("what was moved beside the engine failed") from self._failed[0]

    def _run(self, work: Work, mover: Mover) -> None:
        nbytes = len(work.chunks) * work.pages.shard_bytes(TOKENS) * work.pages.shard_count
        try:
            while not self._stop.is_set():
                mover.once()
                if work.load:
                    self.loaded += nbytes
                else:
                    self.stored += nbytes
        except Exception as e:  # noqa: BLE001 - stop() tells it
            self._failed.append(e)
        finally:
            mover.close()

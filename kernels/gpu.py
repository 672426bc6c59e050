"""The GPU kernels behind ctypes: compiled once by build.py, called with raw addresses and stream handles. No torch here."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import build, rounded
from .nvrtc import DRIVER
from .paged import Geometry

SAVE, LOAD = 0, 1
#: blocks that one chunk may have (the kernel takes them as arguments)
MAX_BLOCKS = 512
#: thread blocks that share the kernel of one chunk: the shorter it is, the less waits for a multiprocessor
BLOCKS = 528
#: results of this many tickets are kept
RESULTS = 1024


#: blocks, tokens, distance between shards, address in host memory
Chunk = tuple[Sequence[int | None], int, int, int]


class GpuError(Exception):
    """The device, or a check before it, refused."""


class _Geometry(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("block", "head", "token", "part")] + [
        (n, ctypes.c_uint32) for n in ("layers", "heads", "parts", "part_bytes", "block_tokens", "payload")
    ]


@dataclass(frozen=True)
class Library:
    """`code`: the kernels, where they are not in the library itself; `how`: what compiled it."""

    functions: ctypes.CDLL
    code: bytes | None
    how: str


def library(arch: str) -> Library:
    """What moves KV on `arch` ("sm_90", "gfx90a"). Raises build.BuildError, with the reason, where plain torch must serve."""
    root = Path(os.environ.get("PDSERVE_HOME") or Path.home() / ".cache" / "pdserve") / "build"
    made = build.gpu_library(root, arch)
    try:
        lib = ctypes.CDLL(str(made.library))
    except OSError as e:
        raise build.BuildError(f"the compiled GPU library does not load: {e}") from e
    if made.code:
        lib.pd_gpu_driver.restype, lib.pd_gpu_driver.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
        if wrong := lib.pd_gpu_driver(DRIVER.encode()):
            raise build.BuildError(f"the driver's library: {wrong.decode()}")
    pointer, i64, u64, i32, u32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_int, ctypes.c_uint32
    for name, result, arguments in (
        ("error", ctypes.c_char_p, []),
        ("open", pointer, [i32, pointer, pointer, u64, i32, i32, i32, ctypes.c_char_p]),
        ("close", None, [pointer]),
        ("register", i32, [i32, pointer, u64]),
        ("unregister", i32, [i32, pointer]),
        ("mark", pointer, [i32, pointer]),
        ("unmark", None, [i32, pointer]),
        ("save", i64, [pointer, pointer, pointer, i32, u32, u64, pointer, u64]),
        ("load", i64, [pointer, pointer, pointer, i32, u32, u64, pointer, i32]),
        ("submit", i32, [pointer, i32, pointer, i32, pointer, pointer, pointer, pointer, pointer, u64, i32]),
        ("submitted", i64, [pointer, i32]),
        ("done", i64, [pointer, i32]),
        ("wait", i32, [pointer, i32, i64]),
        ("digests", None, [pointer, i32, i64, u64, pointer]),
        ("settle", i32, [pointer]),
        ("move", i32, [pointer, i32, pointer, i32, u32, u64, pointer, i32, pointer]),
    ):
        function = getattr(lib, f"pd_gpu_{name}")
        function.restype, function.argtypes = result, arguments
    return Library(lib, made.code.read_bytes() if made.code else None, made.how)


class Mark:
    """A point in the work of a stream: what was submitted before it."""

    def __init__(self, lib: ctypes.CDLL, device: int, stream: int) -> None:
        self._lib, self._device = lib, device
        self.handle = lib.pd_gpu_mark(device, stream)
        if not self.handle:
            raise GpuError(lib.pd_gpu_error().decode())

    def __del__(self) -> None:
        if self.handle:
            self._lib.pd_gpu_unmark(self._device, self.handle)


class Gpu:
    """Staging buffers and streams on one device for one paged KV cache.

    Each direction (SAVE, LOAD) may be used by one thread at a time. `staging_bytes` must hold one chunk of all heads.
    """

    def __init__(
        self,
        arch: str,
        device: int,
        geometry: Geometry,
        staging_bytes: int,
        *,
        depth: int = 3,
        blocks: int = BLOCKS,
    ) -> None:
        geometry.check()
        made = library(arch)
        self._lib, self.device, self.geometry = made.functions, device, geometry
        g = geometry
        numbers = _Geometry(
            g.block_stride,
            g.head_stride,
            g.token_stride,
            g.part_stride,
            g.layers,
            g.heads,
            g.parts,
            g.part_bytes,
            g.block_tokens,
            rounded.code(g.payload, g.dtype),
        )
        bases = np.asarray(g.bases, dtype=np.uint64)
        self._context = self._lib.pd_gpu_open(
            device, bases.ctypes.data, ctypes.byref(numbers), staging_bytes, depth, blocks, int(g.wide), made.code
        )
        if not self._context:
            raise GpuError(self._error())

    def _error(self) -> str:
        return str(self._lib.pd_gpu_error().decode())

    def _try(self, result: int) -> int:
        if result < 0:
            raise GpuError(self._error())
        return result

    def close(self) -> None:
        if self._context:
            self._lib.pd_gpu_close(self._context)
            self._context = None

    def register(self, address: int, nbytes: int) -> None:
        """Pins host memory and maps it for the device; about 0.12 s per GiB."""
        self._try(self._lib.pd_gpu_register(self.device, address, nbytes))

    def unregister(self, address: int) -> None:
        self._try(self._lib.pd_gpu_unregister(self.device, address))

    def mark(self, stream: int) -> Mark:
        return Mark(self._lib, self.device, stream)

    def save(
        self, mark: Mark | None, blocks: Sequence[int], tokens: int, stride: int, host: int, piece: int = 0
    ) -> int:
        """Submits pages -> host memory; a ticket. Waits only while all staging buffers are in use.

        piece: other copies to the host (the engine's own) are let in after so many bytes; 0: after the chunk.
        """
        return self._submit(self._lib.pd_gpu_save, mark, self._ids(blocks), tokens, stride, host, piece)

    def load(
        self, mark: Mark | None, blocks: Sequence[int | None], tokens: int, stride: int, host: int, share: int = 100
    ) -> int:
        """Submits host memory -> pages; None leaves that block alone.

        share: percent of the bus. Below 100 it waits for the DMA, and the next such load begins only when this one would have
        ended at its share of the fastest one's speed.
        """
        return self._submit(self._lib.pd_gpu_load, mark, self._ids(blocks), tokens, stride, host, share)

    def _submit(
        self,
        call: ctypes._NamedFuncPointer,
        mark: Mark | None,
        ids: np.ndarray,
        tokens: int,
        stride: int,
        host: int,
        *more: int,
    ) -> int:
        handle = mark.handle if mark else None
        return self._try(call(self._context, handle, ids.ctypes.data, ids.size, tokens, stride, host, *more))

    def submit(
        self, lane: int, mark: Mark | None, chunks: Sequence[Chunk], piece: int = 0, share: int = 100
    ) -> list[int]:
        """Several chunks in one call, which holds no interpreter lock while it waits for buffers. One ticket each, in order;
        fewer when the device refused one, and GpuError when it refused the first.

        piece, share: as save() and load() have them, for whichever of the two this is.
        """
        ids = [self._ids(blocks) for blocks, _, _, _ in chunks]
        flat = np.ascontiguousarray(np.concatenate(ids))
        counts = np.array([i.size for i in ids], np.int32)
        tokens = np.array([c[1] for c in chunks], np.uint32)
        strides = np.array([c[2] for c in chunks], np.uint64)
        hosts = np.array([c[3] for c in chunks], np.uint64)
        arrays = (flat, counts, tokens, strides, hosts)
        done = self._lib.pd_gpu_submit(
            self._context,
            lane,
            mark.handle if mark else None,
            len(chunks),
            *(a.ctypes.data for a in arrays),
            piece,
            share,
        )
        if not done:
            raise GpuError(self._error())
        end = int(self._lib.pd_gpu_submitted(self._context, lane))
        return list(range(end - done, end))

    def _ids(self, blocks: Sequence[int | None]) -> np.ndarray:
        ids = np.array([-1 if b is None else b for b in blocks], dtype=np.int32)
        # Raw addresses are made from these on the device.
        if ids.size > MAX_BLOCKS or (ids.size and (int(ids.max()) >= self.geometry.num_blocks or int(ids.min()) < -1)):
            raise ValueError(f"blocks {blocks} of {self.geometry.num_blocks}, at most {MAX_BLOCKS} at once")
        return ids

    def done(self, lane: int) -> int:
        """All tickets of the lane below this number are done. Never waits."""
        return self._try(self._lib.pd_gpu_done(self._context, lane))

    def wait(self, lane: int, ticket: int) -> None:
        self._try(self._lib.pd_gpu_wait(self._context, lane, ticket))

    def digests(self, lane: int, ticket: int, tokens: int) -> list[int]:
        """One per head, of a ticket that is done and not older than RESULTS tickets."""
        out = np.empty(self.geometry.heads, np.uint64)
        self._lib.pd_gpu_digests(self._context, lane, ticket, self.geometry.shard_bytes(tokens), out.ctypes.data)
        return [int(x) for x in out]

    def settle(self) -> None:
        """When this returns, no submitted save reads pages any more. From any thread."""
        self._try(self._lib.pd_gpu_settle(self._context))

    def move(
        self, lane: int, blocks: Sequence[int | None], tokens: int, stride: int, chunk: int, grid: int = 0
    ) -> list[int]:
        """One kernel between the pages and any memory that the device reaches, waited for; for tests and measurements."""
        out = np.empty(self.geometry.heads, np.uint64)
        ids = self._ids(blocks)
        self._try(
            self._lib.pd_gpu_move(
                self._context, lane, ids.ctypes.data, ids.size, tokens, stride, chunk, grid, out.ctypes.data
            )
        )
        return [int(x) for x in out]

"""The GPU's own sources without a GPU: kernels compiled for ordinary threads, the host part over a driver that is none.

Results are compared with plain torch, bit for bit. What a GPU alone can show (speed, memory checks) is in tests/gpu.
"""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import pytest

from pdserve import kernels
from pdserve.kernels import build, gpu, rounded
from pdserve.kernels.paged import Geometry

torch = pytest.importorskip("torch", reason="the oracle is the plain torch path")
from pdserve.kernels import torch_path  # noqa: E402

rng = np.random.default_rng()
LAYERS, BLOCKS = 2, 9
#: what the dimensions of a cache are, in the order in which they lie in memory
ORDERS = {
    "packed NHD": ("block", "token", "head", "part", "content"),
    "packed HND": ("block", "head", "token", "part", "content"),
    "K and V apart": ("part", "block", "token", "head", "content"),
    "K and V in block": ("block", "part", "token", "head", "content"),
}
#: block tokens, heads, head size, tokens of the chunk
SIZES = [(16, 2, 64, 18), (8, 1, 80, 9)]


PAYLOADS = [("", "bfloat16"), *((p, d) for p in rounded.PAYLOADS for d in rounded.FORMATS)]


def make(order, block_tokens, heads, head, dtype):
    """(layers of random bits as [block, token, head, part, bytes], geometry)"""
    size = rounded.value_bytes(dtype)
    extent = {"block": BLOCKS, "token": block_tokens, "head": heads, "part": 2, "content": head * size}
    physical = [extent[n] for n in ORDERS[order]]
    flat = [torch.from_numpy(rng.integers(0, 256, physical, dtype=np.uint8)) for _ in range(LAYERS)]
    back = [ORDERS[order].index(n) for n in ("block", "token", "head", "part", "content")]
    views = [t.permute(back) for t in flat]
    strides = dict(zip(("block", "token", "head", "part"), views[0].stride()[:4], strict=True))
    geometry = Geometry(
        bases=tuple(t.data_ptr() for t in flat), block_stride=strides["block"], head_stride=strides["head"],
        token_stride=strides["token"], part_stride=strides["part"], heads=heads, parts=2, part_bytes=head * size,
        block_tokens=block_tokens, num_blocks=BLOCKS,
    )  # fmt: skip
    return views, geometry


def run(library, gather, g, blocks, tokens, stride, chunk):
    grid = int(rng.integers(1, 3)), int(rng.integers(1, g.heads + 1))
    threads = 64 if rng.random() < 0.2 else 32
    ids = np.array([-1 if b is None else b for b in blocks], np.int32)
    bases = np.array(g.bases, np.uint64)
    numbers = np.array([g.block_stride, g.head_stride, g.token_stride, g.part_stride], np.int64)
    kind = rounded.code(g.payload, g.dtype)
    sizes = np.array([g.layers, g.heads, g.parts, g.part_bytes, g.block_tokens, kind], np.uint32)
    digests = np.zeros(g.heads, np.uint64)
    library.emulate(
        int(gather), int(g.wide), *grid, threads, *(ctypes.c_void_p(a.ctypes.data) for a in (bases, numbers, sizes, ids)),
        ids.size, tokens, ctypes.c_uint64(stride), ctypes.c_void_p(chunk.ctypes.data),
        ctypes.c_uint64(g.shard_bytes(tokens)), ctypes.c_void_p(digests.ctypes.data),
    )  # fmt: skip
    return [int(d) for d in digests]


@pytest.mark.parametrize(("payload", "dtype"), PAYLOADS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gather_and_scatter_are_the_torch_path(library, order, size, payload, dtype):
    *shape, tokens = size
    views, geometry = make(order, *shape, dtype)
    geometry = dataclasses.replace(geometry, payload=payload, dtype=dtype)
    geometry.check()
    count, shard = -(-tokens // geometry.block_tokens), geometry.shard_bytes(tokens)
    blocks = rng.permutation(BLOCKS)[:count].tolist()
    stride = shard + 16 * int(rng.integers(1, 5))
    chunk = rng.integers(0, 256, (geometry.heads, stride), dtype=np.uint8)
    poison = chunk.copy()
    want = torch_path.gather(views, blocks, tokens)
    want = torch_path.shrink(want, payload, dtype) if payload else want
    found = run(library, True, geometry, blocks, tokens, stride, chunk)
    assert (chunk[:, :shard] == want.flatten(1).numpy()).all()
    assert (chunk[:, shard:] == poison[:, shard:]).all()
    assert found == [kernels.digest(chunk[h, :shard].copy()) for h in range(geometry.heads)]

    expected = [v.clone() for v in views]
    targets = [int(b) if rng.random() < 0.7 else None for b in rng.permutation(BLOCKS)[:count]]
    source = torch.from_numpy(chunk[:, :shard].copy()).view(geometry.heads, LAYERS, tokens, -1)
    torch_path.scatter(torch_path.grow(source, payload, dtype) if payload else source, expected, targets)
    assert run(library, False, geometry, targets, tokens, stride, chunk) == found
    for got, wanted in zip(views, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("payload", rounded.PAYLOADS)
def test_any_bits_at_all_can_be_scattered(library, payload):
    """A damaged chunk is found by its digest; until then its bytes must do no harm."""
    views, geometry = make("packed NHD", 16, 2, 64, "float16")  # kept: the geometry has their addresses
    geometry = dataclasses.replace(geometry, payload=payload, dtype="float16")
    shard = geometry.shard_bytes(16)
    chunk = rng.integers(0, 256, (2, shard), dtype=np.uint8)
    found = run(library, False, geometry, [3], 16, shard, chunk)
    assert found == [kernels.digest(c) for c in chunk]
    want = torch_path.grow(torch.from_numpy(chunk).view(2, LAYERS, 16, -1), payload, "float16")
    assert torch.equal(torch_path.gather(views, [3], 16), want)


@pytest.mark.parametrize(
    ("piece", "share", "settles", "payload"),
    [(0, 100, True, ""), (0, 60, False, rounded.INT8), (1000, 100, True, rounded.INT8), (4096, 10, False, "")],
)
def test_many_chunks_through_the_lanes_with_marks(library, without_kernels, piece, share, settles, payload):
    """More chunks than buffers, after work of the engine that they must wait for, and back behind such work."""
    views, geometry = make("packed NHD", 8, 2, 64, "bfloat16")
    geometry = dataclasses.replace(geometry, payload=payload, dtype="bfloat16")
    tokens, chunks, shard = 12, 7, geometry.shard_bytes(12)
    stride = -(-shard // 64) * 64
    size = geometry.heads * stride
    arena = np.zeros(chunks * size, np.uint8)
    device = gpu.Gpu("sm_90", 0, geometry, size, depth=2, blocks=2)
    device.register(arena.ctypes.data, arena.nbytes)

    new = [torch.from_numpy(rng.integers(0, 256, v.shape, dtype=np.uint8)) for v in views]
    new = [torch.empty_strided(v.shape, v.stride(), dtype=torch.uint8).copy_(n) for v, n in zip(views, new, strict=True)]
    engine_writes(library, views, new)
    mark = device.mark(0)
    plan = [rng.permutation(BLOCKS)[:2].tolist() for _ in range(chunks)]
    parts = [(p, tokens, stride, arena.ctypes.data + i * size) for i, p in enumerate(plan)]
    tickets = device.submit(gpu.SAVE, mark, parts, piece)
    if settles:
        device.settle()
        for view in views:  # from here on the engine may write the blocks again
            view.fill_(0xEE)
    device.wait(gpu.SAVE, tickets[-1])
    assert device.done(gpu.SAVE) == chunks
    for i, p in enumerate(plan):
        want = torch_path.gather(new, p, tokens)
        want = torch_path.shrink(want, payload, "bfloat16") if payload else want
        rows = arena[i * size : (i + 1) * size].reshape(geometry.heads, stride)[:, :shard]
        assert (rows == want.flatten(1).numpy()).all()
        assert device.digests(gpu.SAVE, tickets[i], tokens) == [kernels.digest(r.copy()) for r in rows]

    zero = [torch.zeros_like(v) for v in views]
    engine_writes(library, views, zero)  # earlier work: what is loaded must not be overwritten by it
    mark = device.mark(0)
    targets = [plan[-1][0], None]
    ticket = device.submit(gpu.LOAD, mark, [(targets, tokens, stride, parts[-1][3])] * 3, share=share)[-1]
    while device.done(gpu.LOAD) <= ticket:
        pass  # each question lets the device do something
    assert device.digests(gpu.LOAD, ticket, tokens) == device.digests(gpu.SAVE, tickets[-1], tokens)
    source = torch.from_numpy(arena[-size:].reshape(geometry.heads, stride)[:, :shard].copy()).view(2, LAYERS, tokens, -1)
    torch_path.scatter(torch_path.grow(source, payload, "bfloat16") if payload else source, zero, targets)
    for got, wanted in zip(views, zero, strict=True):
        assert torch.equal(got, wanted)
    device.unregister(arena.ctypes.data)
    del mark
    device.close()


def engine_writes(library, views, values):
    """A kernel of the engine, submitted but not yet run."""
    for view, value in zip(views, values, strict=True):
        nbytes = ctypes.c_size_t(view.numel())
        library.emulated_copy(ctypes.c_void_p(view.data_ptr()), ctypes.c_void_p(value.data_ptr()), nbytes)


def test_one_kernel_alone_and_what_is_refused(without_kernels):
    views, geometry = make("packed HND", 8, 2, 64, "bfloat16")
    shard = geometry.shard_bytes(8)
    device = gpu.Gpu("sm_90", 0, geometry, 2 * shard, depth=2)
    chunk = np.zeros((2, shard), np.uint8)
    digests = device.move(gpu.SAVE, [4], 8, shard, chunk.ctypes.data, grid=3)
    assert (chunk == torch_path.gather(views, [4], 8).flatten(1).numpy()).all()
    assert digests == [kernels.digest(c) for c in chunk]
    for blocks, tokens, stride in (([1], 9, shard), ([1], 8, shard - 16), ([1], 8, 2 * shard), ([None], 8, shard)):
        with pytest.raises(gpu.GpuError):
            device.save(None, blocks, tokens, stride, chunk.ctypes.data)
    with pytest.raises(gpu.GpuError, match="no share"):
        device.load(None, [4], 8, shard, chunk.ctypes.data, share=0)
    device.close()


def test_what_is_wrong_with_driver_or_kernels_is_said(without_kernels, monkeypatch):
    _, geometry = make("packed HND", 8, 2, 64, "bfloat16")
    without_kernels.write_bytes(b"another GPU's\0")
    with pytest.raises(gpu.GpuError, match=r"ModuleLoadData.*invalid argument"):
        gpu.Gpu("sm_90", 0, geometry, 1 << 16)
    monkeypatch.setattr(gpu, "DRIVER", "libm.so.6")
    with pytest.raises(build.BuildError, match=r"libm\.so\.6 has no cuInit"):
        gpu.library("sm_90")
    monkeypatch.setattr(gpu, "DRIVER", "libcuda-there-is-none.so.1")
    with pytest.raises(build.BuildError, match="there-is-none"):
        gpu.library("sm_90")

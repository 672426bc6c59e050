"""What moves KV beside measured engines (tests/gpu/movers.py) moves all of it, and gives everything back."""

import importlib.util
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pdserve import kernels
from pdserve.engines.vllm.giving_way import GivingWay
from pdserve.kernels import gpu
from pdserve.kernels.paged import Geometry
from pdserve.transfer.staging import stride_of

PATH = Path(__file__).parents[1] / "gpu" / "movers.py"
LAYERS, HEADS, PART, BLOCK = 2, 2, 64, 16  # bytes of a part: one token and head's K or V
BLOCKS, CHUNKS, TOKENS = 24, 5, 32


@pytest.fixture
def movers(monkeypatch):
    spec = importlib.util.spec_from_file_location("movers", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "movers", module)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CHUNKS", CHUNKS)
    monkeypatch.setattr(module, "TOKENS", TOKENS)
    # Each of a kernel's threads is a thread here: few thread blocks.
    few = SimpleNamespace(Gpu=partial(gpu.Gpu, blocks=2), SAVE=gpu.SAVE, LOAD=gpu.LOAD)
    monkeypatch.setattr(module, "gpu", few)
    return module


class Client:
    """Grants from an arena in this process, and remembers what came back."""

    def __init__(self, size: int) -> None:
        self.arena = SimpleNamespace(bytes=np.zeros(size, np.uint8))
        self.granted: list[int] = []
        self._at = 0

    def reserve(self, writer, items, timeout):
        grants = []
        for item in items:
            grants.append(SimpleNamespace(reservation=len(self.granted), offset=self._at))
            self.granted.append(grants[-1].reservation)
            self._at += item.count * stride_of(item.shard_bytes)
        return grants

    def abort(self, reservations, timeout):
        for r in reservations:
            self.granted.remove(r)


@pytest.fixture
def side(without_kernels):
    token = HEADS * 2 * PART
    layers = [np.random.default_rng().integers(0, 256, BLOCKS * BLOCK * token, dtype=np.uint8) for _ in range(LAYERS)]
    geometry = Geometry(
        bases=tuple(x.ctypes.data for x in layers), block_stride=BLOCK * token, head_stride=2 * PART, token_stride=token, part_stride=PART,
        heads=HEADS, parts=2, part_bytes=PART, block_tokens=BLOCK, num_blocks=BLOCKS,
    )  # fmt: skip
    shard = geometry.shard_bytes(TOKENS)
    pages = SimpleNamespace(
        _arch="sm_90", _device=0, _geometry=geometry, _staging_bytes=HEADS * shard, shard_count=HEADS, shard_bytes=geometry.shard_bytes,
        together=2, layers=layers,
    )  # fmt: skip
    return SimpleNamespace(
        _pages=SimpleNamespace(parts=[pages]), _client=Client(4 * CHUNKS * HEADS * shard), _way=GivingWay()
    )


def shards(pages, ids: list[int]) -> np.ndarray:
    """[heads, layers, tokens, K and V] of these blocks, plainly."""
    each = [x.reshape(BLOCKS, BLOCK, HEADS, 2 * PART)[ids].reshape(-1, HEADS, 2 * PART)[:TOKENS] for x in pages.layers]
    return np.stack(each).transpose(2, 0, 1, 3).reshape(HEADS, -1)


@pytest.mark.parametrize("how", ["store:turns:1", "store:piece:1", "store:dma:2", "load:dma:2", "load:share:60"])
def test_once_moves_all_chunks(movers, side, how):
    way, kind, size = how.split(":")
    pages = side._pages.parts[0]
    work, _ = movers.reserved(side, way == "load", int(size))
    if work.load:
        for area in work.areas:
            area[:] = np.random.default_rng().integers(0, 256, area.size, dtype=np.uint8)
    mover = movers.KINDS[kind](work)
    mover.once()
    for (ids, _, stride, _), area in zip(work.chunks, work.areas, strict=True):
        got = area.reshape(HEADS, stride)[:, : pages.shard_bytes(TOKENS)]
        assert (got == shards(pages, ids)).all()
    mover.close()


def test_stores_and_loads_at_once_until_it_is_stopped(movers, side, monkeypatch):
    """The driver below is for one thread, so what moves here is counted only."""
    monkeypatch.setitem(movers.KINDS, "dma", lambda work: SimpleNamespace(once=lambda: None, close=lambda: None))
    beside = movers.Beside(side, "store:dma:1+load:dma:1")
    assert len(side._client.granted) == 2 * CHUNKS
    beside.start()
    end = time.monotonic() + 10
    while not (beside.stored and beside.loaded) and time.monotonic() < end:
        time.sleep(0.001)
    beside.stop()
    assert beside.stored
    assert beside.loaded
    assert beside.stored % (CHUNKS * HEADS * side._pages.parts[0].shard_bytes(TOKENS)) == 0
    assert side._client.granted == []


@pytest.mark.parametrize("fails", [True, False])
def test_what_fails_or_does_not_end_is_told(movers, side, monkeypatch, fails):
    may_end = threading.Event()

    def once() -> None:
        if fails:
            raise ValueError("no such device")
        may_end.wait(10)

    monkeypatch.setitem(movers.KINDS, "dma", lambda work: SimpleNamespace(once=once, close=lambda: None))
    monkeypatch.setattr(movers, "END_S", 10.0 if fails else 0.01)
    beside = movers.Beside(side, "load:dma:1")
    beside.start()
    with pytest.raises(RuntimeError, match="failed" if fails else "did not end"):
        beside.stop()
    assert bool(side._client.granted) is not fails, "what may still be written to is not given back"
    may_end.set()


def test_nothing_beside(movers):
    beside = movers.Beside(None, "")
    beside.start()
    beside.stop()
    assert (beside.stored, beside.loaded) == (0, 0)


def test_digests_are_the_reference(movers, side):
    """What a store through these lanes says of itself, so that garbage is not measured."""
    pages = side._pages.parts[0]
    work, _ = movers.reserved(side, False, 1)
    mover = movers.AtOnce(work)
    mover.once()
    for n, area in enumerate(work.areas):
        rows = area.reshape(HEADS, -1)[:, : pages.shard_bytes(TOKENS)]
        assert mover.device.digests(gpu.SAVE, n, TOKENS) == [kernels.digest(r.copy()) for r in rows]
    mover.close()

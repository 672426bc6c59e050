"""A chunk's shards go to the right heads whatever the tensor parallel sizes of who stores and who loads: the layout code itself on
random data, bit for bit, for all combinations, with blocks of host memory (CPU vLLM) and of a device."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from pdserve.chunk import AS_IS, FP8, INT8, ChunkLayout
from pdserve.kernels import rounded

torch = pytest.importorskip("torch", reason="needs an engine's environment")
pytest.importorskip("vllm", reason="needs an engine's environment")
from pdserve.engines.vllm import device_layout, layout  # noqa: E402
from pdserve.transfer.staging import TorchPages, stride_of  # noqa: E402

HEADS, HEAD, LAYERS, BLOCKS = 4, 16, 2, 6
SIZES = [1, 2, 4, 8]  # workers; with 8 each head is held by two
WAYS = list(itertools.product(SIZES, SIZES))
DTYPE = torch.bfloat16


def values(tokens):
    """[layer][block, token, head, K or V, size], of the whole model."""
    return torch.randn(LAYERS, BLOCKS, tokens, HEADS, 2, HEAD).to(DTYPE)


def host(model, rank, workers, payload):
    """A worker of CPU vLLM: [block][head][K of all tokens, V of all tokens]."""
    first, count, _ = place = device_layout.owned(rank, workers, HEADS)
    mine = model[:, :, :, first : first + count].permute(0, 1, 3, 4, 2, 5).contiguous()  # layer, block, head, part, token
    tokens = model.shape[2]
    kv = {f"layer{i}": mine[i].view(BLOCKS, count, tokens, 2 * HEAD) for i in range(LAYERS)}
    declared = ChunkLayout(
        kind="opaque-block", kv_dtype="bfloat16", layers=LAYERS, block_tokens=tokens,
        block_bytes=tokens * 2 * HEAD * 2, shards=HEADS, payload=payload,
    )  # fmt: skip
    return layout.host_pages(kv, list(kv), declared, BLOCKS, place), mine


def device(model, rank, workers, payload):
    """A worker of CUDA vLLM, through plain torch: [block][head][token][K, V]."""
    first, count, stores = device_layout.owned(rank, workers, HEADS)
    mine = model[:, :, :, first : first + count].flatten(4).permute(0, 1, 3, 2, 4).contiguous()
    tokens = model.shape[2]
    order = {"block": 0, "head": 1, "token": 2, "content": 3}
    spec = SimpleNamespace(block_size=tokens, real_page_size_bytes=tokens * count * 2 * HEAD * 2)
    geometry, _ = device_layout.geometry_of(list(mine), order, spec, BLOCKS, count)
    if payload:
        geometry = device_layout.rounded(geometry, payload, "bfloat16")
    views = [device_layout.view_of(t, order) for t in mine]
    return TorchPages(views, first_shard=first, stores=stores, rounding=(payload, "bfloat16") if payload else None), mine


@pytest.mark.parametrize("payload", [AS_IS, FP8, INT8], ids=["as it is", FP8, INT8])
@pytest.mark.parametrize("make", [host, device])
@pytest.mark.parametrize(("writers", "readers"), WAYS, ids=[f"{a} to {b}" for a, b in WAYS])
def test_what_some_workers_store_others_load(make, writers, readers, payload):
    # A GPU engine may have other blocks than the one that stored; on a CPU they must be the same.
    tokens, other, used = 8, 8 if make is host else 4, 21
    source, target = values(tokens), values(other)
    ids, to = [4, 0, 5], list(np.random.default_rng().permutation(BLOCKS)[: -(-used // other)])
    shard = make(source, 0, 1, payload)[0].shard_bytes(used, len(ids))
    stride = stride_of(shard)
    arena = np.full(HEADS * stride, 0xEE, np.uint8)
    written: dict[int, int] = {}
    for rank in range(writers):
        pages, _ = make(source, rank, writers, payload)
        at = pages.first_shard
        if pages.stores:
            area = arena[at * stride : (at + pages.shard_count) * stride]
            digests = pages.store(None, ids, used, area, stride).digests()
            assert not written.keys() & set(range(at, at + pages.shard_count)), "a shard was stored twice"
            written |= dict(enumerate(digests, at))
    assert sorted(written) == list(range(HEADS))
    for rank in range(readers):
        pages, mine = make(target, rank, readers, payload)
        first, count, _ = device_layout.owned(rank, readers, HEADS)
        before = mine.clone()
        area = arena[first * stride : (first + count) * stride]
        assert pages.load(None, area, to, used, stride).digests() == [written[h] for h in range(first, first + count)]
        got, left = _tokens(make, mine, other), _tokens(make, before, other)
        want = _rounded(make, source, payload)[:, ids, :, first : first + count].flatten(1, 2)
        moved = used if make is device else len(ids) * tokens  # whole blocks
        assert torch.equal(got[:, to].flatten(1, 2)[:, :moved], want[:, :moved])
        assert torch.equal(got[:, to].flatten(1, 2)[:, moved:], left[:, to].flatten(1, 2)[:, moved:])
        others = [b for b in range(BLOCKS) if b not in to]
        assert torch.equal(got[:, others], left[:, others])


def _tokens(make, mine, tokens):
    """A worker's blocks as [layer][block, token, head, K or V, size]."""
    if make is host:
        return mine.view(LAYERS, BLOCKS, -1, 2, tokens, HEAD).permute(0, 1, 4, 2, 3, 5)
    return mine.unflatten(4, (2, HEAD)).permute(0, 1, 3, 2, 4, 5)


def _rounded(make, model, payload):
    """What a load must give back of the whole model's values."""
    _, mine = make(model, 0, 1, AS_IS)
    if payload:
        rows = mine.reshape(-1, 2 * HEAD).view(torch.uint8).numpy()
        mine = torch.from_numpy(rounded.grow(rounded.shrink(rows, payload, "bfloat16"), payload, "bfloat16")).view(DTYPE).view_as(mine)
    return _tokens(make, mine, model.shape[2])

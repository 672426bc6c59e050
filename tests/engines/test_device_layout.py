"""The strides that are read off a declared layout, and that chunks do not depend on block size, layout or parallel size."""

from types import SimpleNamespace

import numpy as np
import pytest

from pdserve import kernels
from pdserve.chunk import ChunkLayout
from pdserve.errors import UnsupportedError
from pdserve.transfer.staging import TorchPages, stride_of

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
from pdserve.engines.vllm import device_layout  # noqa: E402

HEADS, HEAD, LAYERS, BLOCKS = 4, 16, 3, 12


def backend(shape):
    return type(
        "Backend", (), {"get_kv_cache_shape": staticmethod(lambda b, t, h, d, cache_dtype_str: shape(b, t, h, d))}
    )


PACKED = backend(lambda b, t, h, d: (b, h, t, 2 * d))
APART = backend(lambda b, t, h, d: (2, b, t, h, d))


def spec(tokens, heads=HEADS, size=HEAD):
    return SimpleNamespace(
        block_size=tokens, num_kv_heads=heads, head_size=size, real_page_size_bytes=tokens * heads * 2 * size * 2
    )


def cache(which, tokens, heads, blocks=BLOCKS):
    """Layers of a cache, NHD in memory, and the K and V values as [layer][block, token, head, K or V, head size]."""
    values = [torch.randn(blocks, tokens, heads, 2, HEAD).to(torch.bfloat16) for _ in range(LAYERS)]
    if which is PACKED:
        return [v.flatten(3).contiguous().permute(0, 2, 1, 3) for v in values], values
    return [v.permute(3, 0, 1, 2, 4).contiguous() for v in values], values


def pages(which, layers, tokens, heads, first=0, blocks=BLOCKS, split=1):
    order = device_layout.dimensions(which, spec(tokens * split, heads), "auto")
    geometry, found = device_layout.geometry_of(layers, order, spec(tokens * split, heads), blocks // split, heads)
    assert found == split
    assert geometry.shard_bytes(10) == LAYERS * 10 * 2 * HEAD * 2
    views = [device_layout.view_of(t, order) for t in layers]
    return TorchPages(views, first_shard=first, stores=True, split=split), geometry


def rows(values, block_ids, tokens):
    return torch.stack([v[block_ids].flatten(0, 1)[:tokens] for v in values])  # layer, token, head, K or V, size


@pytest.mark.parametrize("which", [PACKED, APART])
def test_strides_lead_to_each_key_and_value(which):
    layers, values = cache(which, 8, HEADS)
    _, g = pages(which, layers, 8, HEADS)
    rng = np.random.default_rng()
    for _ in range(50):
        layer, b, t, h, part = (int(rng.integers(n)) for n in (LAYERS, BLOCKS, 8, HEADS, 2))
        at = g.bases[layer] + b * g.block_stride + t * g.token_stride + h * g.head_stride
        at += part * g.part_stride if g.parts == 2 else part * g.part_bytes // 2
        size = HEAD * 2
        want = values[layer][b, t, h, part].view(torch.uint8).numpy().tobytes()
        found = kernels.reference._view(at, size).tobytes()
        assert found == want


def test_two_ranks_store_and_one_with_other_blocks_and_layout_loads():
    tokens = 45
    stored = [cache(PACKED, 16, 2), cache(PACKED, 16, 2)]
    stride = stride_of(LAYERS * tokens * 2 * HEAD * 2)
    arena = np.full(HEADS * stride, 0xEE, np.uint8)
    ids, digests = [5, 2, 9], []
    for rank, (layers, _) in enumerate(stored):
        p, _ = pages(PACKED, layers, 16, 2, first=2 * rank)
        digests += p.store(None, ids, tokens, arena[2 * rank * stride : 2 * (rank + 1) * stride], stride).digests()
    layers, values = cache(APART, 8, HEADS)
    before = [v.clone() for v in values]
    loader, _ = pages(APART, layers, 8, HEADS)
    to = [1, 3, 5, 7, 9, 11]
    assert loader.load(None, arena, to, tokens, stride).digests() == digests
    got = [t.permute(1, 2, 3, 0, 4) for t in layers]
    want = torch.cat([rows(v, ids, tokens) for _, v in stored], dim=2)
    assert torch.equal(rows(got, to, tokens), want)
    assert torch.equal(rows(got, [0, 2, 4], 24), rows(before, [0, 2, 4], 24))
    assert torch.equal(got[0][11, 5:], before[0][11, 5:])  # after the last token


def test_kernel_blocks_smaller_than_engine_blocks():
    layers, values = cache(PACKED, 8, HEADS)
    p, _ = pages(PACKED, layers, 8, HEADS, split=2)
    stride = stride_of(p.shard_bytes(20))
    arena = np.zeros(HEADS * stride, np.uint8)
    p.store(None, [4, 1], 20, arena, stride)
    want = rows(values, [8, 9, 2], 20).permute(2, 0, 1, 3, 4).contiguous()
    got = arena.reshape(HEADS, stride)[:, : p.shard_bytes(20)]
    assert (got == want.view(torch.uint8).flatten(1).numpy()).all()


@pytest.mark.parametrize(
    ("rank", "workers", "heads", "want"),
    [
        (1, 2, 8, (4, 4, True)),
        (0, 1, 8, (0, 8, True)),
        (3, 4, 2, (1, 1, False)),
        (2, 4, 2, (1, 1, True)),
        (1, 2, 1, (0, 1, False)),
    ],
)
def test_which_heads_a_rank_owns(rank, workers, heads, want):
    assert device_layout.owned(rank, workers, heads) == want


def test_what_a_backend_declares_differently_is_refused():
    nvfp4 = backend(lambda b, t, h, d: (b, 2 * h, t, d))
    with pytest.raises(UnsupportedError, match="does not understand"):
        device_layout.dimensions(nvfp4, spec(16), "auto")
    layers, _ = cache(PACKED, 16, HEADS)
    order = device_layout.dimensions(PACKED, spec(16), "auto")
    for wrong in (spec(32), spec(16, heads=2), spec(16, size=32)):
        with pytest.raises(UnsupportedError, match="does not guess"):
            device_layout.geometry_of(layers, order, wrong, BLOCKS, wrong.num_kv_heads)
    mixed = [*layers[:-1], layers[-1].permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)[:, :, :8]]
    with pytest.raises(UnsupportedError, match="does not guess"):
        device_layout.geometry_of(mixed, order, spec(16), BLOCKS, HEADS)


def test_canonical_identity_leaves_out_the_engines_own_block_size():
    def layout(block_tokens, **other):
        return ChunkLayout(
            kind="canonical",
            kv_dtype="bfloat16",
            layers=LAYERS,
            block_tokens=block_tokens,
            block_bytes=64 * block_tokens,
            **{"shards": 8, **other},
        )

    assert layout(16).identity() == layout(128).identity() != layout(16, shards=4).identity()
    assert layout(16).shard_bytes(45) == 45 * LAYERS * 64

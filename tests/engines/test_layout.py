"""From what vLLM declares to addresses and layouts, on real tensors and vLLM's own spec classes."""

import types

import numpy as np
import pytest

from pdserve.chunk import ChunkLayout
from pdserve.errors import ConfigError, UnsupportedError

torch = pytest.importorskip("torch", reason="needs an engine's environment")
specs = pytest.importorskip("vllm.v1.kv_cache_interface", reason="needs an engine's environment")
layout = pytest.importorskip("pdserve.engines.vllm.layout")

BLOCKS, HEADS, BLOCK, WIDTH = 6, 3, 8, 16
BYTES = BLOCK * WIDTH * 4  # of one head's block
MINE = (0, HEADS, True)  # all heads are this worker's


def declared(**change):
    fields = {
        "kind": "opaque-block",
        "kv_dtype": "float32",
        "layers": 2,
        "block_tokens": BLOCK,
        "block_bytes": BYTES,
        "shards": HEADS,
    }
    return ChunkLayout(**{**fields, **change})


def caches():
    whole = torch.rand(2, BLOCKS, HEADS, BLOCK, WIDTH)  # both layers are views of one storage, as on CPU
    return {"a": whole[0], "b": whole[1]}


def test_registered_tensors_become_pages_that_read_and_write_them():
    kv = caches()
    pages = layout.host_pages(kv, ["a", "b"], declared(), BLOCKS, MINE)
    size = pages.shard_bytes(16, 2)
    chunk = np.zeros(HEADS * size, np.uint8)
    digests = pages.store(None, [4, 1], 16, chunk, size).digests()
    want = torch.stack([kv["a"][[4, 1]], kv["b"][[4, 1]]]).permute(2, 0, 1, 3, 4)  # head, layer, block
    assert (chunk == want.numpy().reshape(-1).view(np.uint8)).all()
    assert pages.load(None, chunk, [0, None], 16, size).digests() == digests
    assert torch.equal(kv["a"][0], kv["a"][4])
    assert torch.equal(kv["b"][0], kv["b"][4])


@pytest.mark.parametrize(
    ("change", "blocks", "names", "says"),
    [
        ({"block_bytes": BYTES * 2}, BLOCKS, ["a"], "does not guess layouts"),
        ({}, BLOCKS + 1, ["a"], "does not guess layouts"),
        ({}, BLOCKS, ["a", "missing"], "layer missing but registered none"),
    ],
)
def test_tensors_that_are_not_as_declared_are_refused(change, blocks, names, says):
    with pytest.raises(UnsupportedError, match=says):
        layout.host_pages(caches(), names, declared(**change), blocks, MINE)


def test_blocks_with_gaps_inside_are_refused():
    kv = {"a": torch.rand(BLOCKS, HEADS, BLOCK, WIDTH * 2)[..., :WIDTH]}
    with pytest.raises(UnsupportedError, match="does not guess layouts"):
        layout.host_pages(kv, ["a"], declared(layers=1), BLOCKS, MINE)


def test_a_block_that_does_not_exist_is_refused_before_memory_is_touched():
    pages = layout.host_pages(caches(), ["a", "b"], declared(), BLOCKS, MINE)
    with pytest.raises(ValueError, match=f"block {BLOCKS} of {BLOCKS}"):
        pages.store(None, [BLOCKS], 8, np.zeros(HEADS * pages.shard_bytes(8, 1), np.uint8), pages.shard_bytes(8, 1))


def configs(spec, groups=1, **parallel):
    parallel_config = types.SimpleNamespace(**{"pipeline_parallel_size": 1, "tensor_parallel_size": 1, **parallel})
    vllm_config = types.SimpleNamespace(
        parallel_config=parallel_config,
        device_config=types.SimpleNamespace(device_type="cpu"),
        model_config=types.SimpleNamespace(get_total_num_kv_heads=lambda: 3),
    )
    return vllm_config, types.SimpleNamespace(
        kv_cache_groups=[types.SimpleNamespace(kv_cache_spec=spec, layer_names=["a"])] * groups
    )


FULL = {"block_size": 128, "num_kv_heads": 3, "head_size": 64, "dtype": torch.bfloat16}


def test_full_attention_is_supported_and_declares_its_layout():
    vllm_config, kv_config = configs(specs.FullAttentionSpec(**FULL))
    layout.check_supported(vllm_config, kv_config)
    made = layout.chunk_layout(vllm_config, kv_config)
    assert (made.block_tokens, made.block_bytes, made.shards) == (128, 2 * 128 * 64 * 2, 3)  # of one head
    assert (made.kv_dtype, made.layers) == ("bfloat16", 1)


def test_a_rounded_payload_is_part_of_the_identity_and_refused_where_it_saves_nothing():
    vllm_config, kv_config = configs(specs.FullAttentionSpec(**FULL))
    made = [layout.chunk_layout(vllm_config, kv_config, payload) for payload in ("", "int8", "fp8")]
    assert len({m.identity() for m in made}) == 3
    assert made[0].shard_bytes(130) == 2 * 128 * 128 * 2  # two blocks of 128 tokens, K and V of 64 values
    assert made[1].shard_bytes(130) == made[2].shard_bytes(130) == 2 * 128 * (128 + 8)
    eight_bits = configs(specs.FullAttentionSpec(**{**FULL, "dtype": torch.uint8}))
    with pytest.raises(ConfigError, match="does not go with a KV cache of uint8"):
        layout.chunk_layout(*eight_bits, "int8")
    with pytest.raises(ConfigError, match="'int4' does not go"):
        layout.chunk_layout(vllm_config, kv_config, "int4")


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: configs(specs.FullAttentionSpec(**FULL), groups=2), "2 KV cache groups"),
        (lambda: configs(specs.SlidingWindowSpec(**FULL, sliding_window=64)), "SlidingWindowSpec"),
        (
            lambda: configs(
                specs.FullAttentionSpec(**FULL), pipeline_parallel_size=2, distributed_executor_backend="ray"
            ),
            "not every stage's report reaches the scheduler",
        ),
        (lambda: configs(specs.FullAttentionSpec(**FULL), decode_context_parallel_size=2), "context parallelism"),
    ],
)
def test_what_cannot_be_carried_faithfully_is_refused_with_the_reason(made, says):
    with pytest.raises(UnsupportedError, match=says):
        layout.check_supported(*made())

"""The KV cache of vLLM on a GPU, as strides: taken from what the attention backend declares, refused when it is something else.

A backend says with `get_kv_cache_shape` which dimension is what; asked with sizes that cannot be confused with each other, the
answer is unambiguous. The strides are those of the registered tensors. Never guessed from a tensor's shape: vLLM has changed it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from pdserve.chunk import ChunkLayout
from pdserve.errors import UnsupportedError
from pdserve.kernels.paged import Geometry
from pdserve.transfer.staging import Pages, Pinned, pages_on_device

#: numbers that no real cache has, so that each names its dimension
_BLOCKS, _TOKENS, _HEADS = 1000003, 16 * 1021, 1013


def check_supported(vllm_config: Any, spec: Any) -> None:
    """Raises UnsupportedError for a cache whose bytes mean something only together with others that are not in it."""
    mode = getattr(spec, "kv_quant_mode", None)
    if mode is not None and (getattr(mode, "is_per_token_head", False) or getattr(mode, "is_nvfp4", False)):
        raise UnsupportedError(
            f"KV cache quantisation {mode} keeps scales beside the cache; "
            "pdserve carries bf16, fp16, fp32 and fp8 with fixed scales. Set another kv_cache_dtype."
        )
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise UnsupportedError(
            "calculate_kv_scales gives each engine its own scales, so their caches cannot be shared. Turn it off."
        )


def kv_dtype(vllm_config: Any, spec: Any) -> str:
    """The numbers' format; fp8 variants are bytes to torch, so vLLM's own name counts for them."""
    declared = str(vllm_config.cache_config.cache_dtype)
    return declared if declared.startswith("fp8") else str(spec.dtype).removeprefix("torch.")


def total_heads(vllm_config: Any, spec: Any) -> int:
    """KV heads of the whole model: the number of shards."""
    tp = vllm_config.parallel_config.tensor_parallel_size
    if spec.num_kv_heads == 1 and is_latent(spec):
        return 1
    total = int(vllm_config.model_config.get_total_num_kv_heads())
    if spec.num_kv_heads != max(1, total // tp):
        raise UnsupportedError(
            f"{total} KV heads on {tp} workers, but vLLM declares {spec.num_kv_heads} on each; pdserve does not know which."
        )
    return total


def is_latent(spec: Any) -> bool:
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    return isinstance(spec, MLAAttentionSpec)


def owned(rank: int, workers: int, heads: int) -> tuple[int, int, bool]:
    """(first head, how many, whether this worker stores them) of a worker; fewer heads than workers are held by several."""
    if heads >= workers:
        return rank * (heads // workers), heads // workers, True
    copies = workers // heads
    return rank // copies, 1, rank % copies == 0


#: layers' names, and (first shard, how many, whether this worker stores them)
Place = tuple[Sequence[str], tuple[int, int, bool]]


def device_pages(
    kv_caches: dict[str, torch.Tensor],
    vllm_config: Any,
    kv_cache_config: Any,
    layout: ChunkLayout,
    places: Sequence[Place],
) -> list[Pages]:
    """The registered tensors as pages, one for each of `places`. Raises UnsupportedError when they are not what vLLM declared."""
    names = [name for mine, _ in places for name in mine]
    if missing := [name for name in names if name not in kv_caches]:
        raise UnsupportedError(f"vLLM declared a KV cache for layer {missing[0]} but registered none")
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    contexts = vllm_config.compilation_config.static_forward_context
    backends = {contexts[name].get_attn_backend() for name in names}
    if len(backends) != 1:
        raise UnsupportedError(f"layers use different attention backends: {sorted(b.__name__ for b in backends)}")
    order = dimensions(backends.pop(), spec, str(vllm_config.cache_config.cache_dtype))
    pinned, made = Pinned(), []
    for mine, (first, count, stores) in places:
        tensors = [kv_caches[name] for name in mine]
        geometry, split = geometry_of(tensors, order, spec, kv_cache_config.num_blocks, count)
        if layout.payload:
            geometry = rounded(geometry, layout.payload, layout.kv_dtype)
        device = tensors[0].device.index or 0
        made.append(
            pages_on_device(
                geometry,
                functools.partial(_views, tensors, order),
                arch_of(device),
                device,
                first_shard=first,
                stores=stores,
                split=split,
                current_stream=functools.partial(_stream, device),
                pinned=pinned,
            )
        )
    return made


def _views(tensors: list[torch.Tensor], order: dict[str, int]) -> list[torch.Tensor]:
    return [view_of(t, order) for t in tensors]


def _stream(device: int) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def rounded(geometry: Geometry, payload: str, dtype: str) -> Geometry:
    """The same blocks, stored with that payload. Raises UnsupportedError where a token's values do not make a row."""
    made = dataclasses.replace(geometry, payload=payload, dtype=dtype)
    try:
        made.check()
    except ValueError as e:
        raise UnsupportedError(f"cache.payload {payload} cannot be used with this model: {e}. Leave it out.") from e
    return made


def arch_of(device: int) -> str:
    """What the compiler calls this device."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def dimensions(backend: Any, spec: Any, cache_dtype: str) -> dict[str, int]:
    """Which dimension of the backend's tensor is block, token, head, part (K or V) and content; head and part may be absent."""
    shape = backend.get_kv_cache_shape(_BLOCKS, _TOKENS, _HEADS, spec.head_size, cache_dtype_str=cache_dtype)
    names = {_BLOCKS: "block", _TOKENS: "token", _HEADS: "head", 2: "part"}
    order = {names[size]: i for i, size in enumerate(shape[:-1]) if size in names}
    order["content"] = len(shape) - 1
    if len(order) != len(shape) or not {"block", "token"} <= set(order):
        raise UnsupportedError(
            f"attention backend {backend.__name__} declares a KV cache of shape {shape}, "
            "which pdserve does not understand. Choose another with --attention-backend."
        )
    return order


def geometry_of(
    tensors: list[torch.Tensor], order: dict[str, int], spec: Any, num_blocks: int, heads: int
) -> tuple[Geometry, int]:
    """(strides of the layers' tensors, kernel blocks per engine block)."""
    first = tensors[0]
    size = first.element_size()

    def extent(name: str) -> int:
        return int(first.shape[order[name]]) if name in order else 1

    def stride(name: str) -> int:
        return int(first.stride(order[name])) * size if name in order else 0

    split, rest = divmod(extent("block"), num_blocks)
    content = extent("content") * size
    page = extent("token") * extent("head") * extent("part") * content * split
    same = all(t.shape == first.shape and t.stride() == first.stride() and t.dtype == first.dtype for t in tensors)
    if (
        rest
        or not same
        or extent("head") != heads
        or extent("token") * split != spec.block_size
        or page != spec.real_page_size_bytes
        or first.stride(order["content"]) != 1
    ):
        raise UnsupportedError(
            f"KV cache tensors of shape {tuple(first.shape)}, strides {first.stride()}, {first.dtype} are not the {num_blocks} blocks of "
            f"{spec.block_size} tokens, {heads} heads, {spec.real_page_size_bytes} bytes that vLLM declared; "
            "pdserve does not guess layouts. Report this vLLM version and backend."
        )
    geometry = Geometry(
        bases=tuple(t.data_ptr() for t in tensors),
        block_stride=stride("block"),
        head_stride=stride("head"),
        token_stride=stride("token"),
        part_stride=stride("part"),
        heads=heads,
        parts=extent("part"),
        part_bytes=content,
        block_tokens=extent("token"),
        num_blocks=extent("block"),
    )
    try:
        geometry.check()
    except ValueError as e:
        raise UnsupportedError(f"this KV cache cannot be copied in whole words: {e}") from e
    return geometry, split


def view_of(tensor: torch.Tensor, order: dict[str, int]) -> torch.Tensor:
    """The tensor as [block, token, head, part, bytes], uint8, without a copy."""
    view = tensor
    dims = [order[n] for n in ("block", "token", "head", "part", "content") if n in order]
    view = view.permute(dims).view(torch.uint8)
    if "head" not in order:
        view = view.unsqueeze(2)
    if "part" not in order:
        view = view.unsqueeze(3)
    return view

"""What vLLM declares about its KV cache, as a ChunkLayout; what pdserve cannot handle is refused here, at start."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from pdserve import fingerprint, log
from pdserve.chunk import AS_IS, CANONICAL, FP8, INT8, OPAQUE, ROUNDED_VALUE_BYTES, ChunkLayout
from pdserve.engines.vllm import device_layout, stages
from pdserve.errors import ConfigError, UnsupportedError
from pdserve.transfer.staging import Pages
from pdserve.transfer.staging_host import HostPages


def check_supported(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raises UnsupportedError for a model or setting whose KV this connector would not carry faithfully."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(sorted({type(g.kv_cache_spec).__name__ for g in groups})) or "none"
        raise UnsupportedError(
            f"the model has {len(groups)} KV cache groups ({kinds}); pdserve supports models with one group of full attention. "
            "Run it without the pdserve connector."
        )
    spec = groups[0].kv_cache_spec
    if not isinstance(spec, FullAttentionSpec):
        raise UnsupportedError(
            f"the model's KV cache is of kind {type(spec).__name__}; pdserve supports full attention, "
            "where a prefix keeps all its blocks. Run it without the pdserve connector."
        )
    parallel = vllm_config.parallel_config
    stages.check_supported(vllm_config, groups[0].layer_names)
    if (
        getattr(parallel, "decode_context_parallel_size", 1) > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1
    ):
        raise UnsupportedError("context parallelism is not supported by the pdserve connector.")
    if on_device(vllm_config):
        device_layout.check_supported(vllm_config, spec)


def on_device(vllm_config: Any) -> bool:
    """Whether the KV cache is in a GPU's memory. ROCm calls itself cuda, too."""
    return bool(vllm_config.device_config.device_type == "cuda")


def chunk_layout(vllm_config: Any, kv_cache_config: Any, payload: str = AS_IS, layer_groups: int = 1) -> ChunkLayout:
    """How this engine's chunks look. Both sides of the connector compute it from the same declarations."""
    made = _chunk_layout(vllm_config, kv_cache_config, layer_groups)
    if payload == AS_IS:
        return made
    if payload not in (FP8, INT8) or made.kv_dtype not in ROUNDED_VALUE_BYTES:
        raise ConfigError(
            "kv_connector_extra_config.pdserve.payload",
            f"{payload!r} does not go with a KV cache of {made.kv_dtype}",
            f"Leave it out, or use {FP8} or {INT8} with {', '.join(ROUNDED_VALUE_BYTES)}.",
        )
    return made.stored_as(payload)


def _chunk_layout(vllm_config: Any, kv_cache_config: Any, layer_groups: int) -> ChunkLayout:
    group = kv_cache_config.kv_cache_groups[0]
    spec = group.kv_cache_spec
    kind = "mla" if isinstance(spec, MLAAttentionSpec) else "attention"
    layers = stages.total_layers(vllm_config, group.layer_names, layer_groups)
    heads = device_layout.total_heads(vllm_config, spec)
    stages.check_groups(vllm_config, layers, heads, layer_groups)
    if on_device(vllm_config):
        return ChunkLayout(
            kind=CANONICAL,
            kv_dtype=device_layout.kv_dtype(vllm_config, spec),
            layers=layers,
            block_tokens=spec.block_size,
            block_bytes=spec.real_page_size_bytes // spec.num_kv_heads,
            shards=heads,
            detail=f"{kind} head={spec.head_size}",
        ).grouped(layer_groups)
    return ChunkLayout(
        kind=OPAQUE,
        kv_dtype=str(spec.dtype).removeprefix("torch."),
        layers=layers,
        block_tokens=spec.block_size,
        block_bytes=spec.page_size_bytes // spec.num_kv_heads,
        shards=heads,
        # The packing inside a head's block depends on the attention code that the machine's instruction set selects.
        detail=f"{kind} head={getattr(spec, 'head_size', 0)} {_backend(vllm_config)}",
    ).grouped(layer_groups)


def _backend(vllm_config: Any) -> str:
    layout = getattr(getattr(vllm_config, "cache_config", None), "kv_cache_layout", None)
    amx = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
    return f"cpu {torch.backends.cpu.get_cpu_capability()} amx={amx} {layout}"


def model_fingerprint(vllm_config: Any, override: str = "") -> str:
    """Stands for the model's numbers: configuration, dtype, quantisation, weights. `override` replaces it all."""
    if override:
        return f"override:{override}"
    model = vllm_config.model_config
    config = fingerprint.of_config(
        model.hf_config.to_dict(), str(model.dtype), str(model.quantization), str(vllm_config.cache_config.cache_dtype)
    )
    if str(vllm_config.load_config.load_format) in ("dummy", "LoadFormat.DUMMY"):
        return f"{config}:dummy:{model.seed}"
    folder = _weights_folder(model)
    weights = fingerprint.of_weights(folder) if folder else None
    if weights is None:
        weights = hashlib.sha256(f"{model.model}@{model.revision}".encode()).hexdigest()[:32]
        log.get("connector").warning(
            "no weight files found for %s: the cache tells models apart by name and revision only. "
            "Set pdserve.model_fingerprint to be sure.",
            model.model,
        )
    return f"{config}:{weights}"


def _weights_folder(model: Any) -> Path | None:
    path = Path(model.model)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None


def pages(
    kv_caches: dict[str, torch.Tensor], vllm_config: Any, kv_cache_config: Any, layout: ChunkLayout, rank: int
) -> list[Pages]:
    """Where the blocks of a worker, `rank` of its engine's, are, ready to be copied: one for each layer group that it has. Raises
    UnsupportedError when they are not what vLLM declared."""
    workers = vllm_config.parallel_config.tensor_parallel_size
    first, count, stores = device_layout.owned(rank % workers, workers, layout.heads)
    names = kv_cache_config.kv_cache_groups[0].layer_names
    groups = stages.parts(vllm_config, names, layout.layers, layout.layer_groups)
    places = [(mine, (group * layout.heads + first, count, stores)) for group, mine in groups]
    if layout.kind == CANONICAL:
        return device_layout.device_pages(kv_caches, vllm_config, kv_cache_config, layout, places)
    return [host_pages(kv_caches, mine, layout, kv_cache_config.num_blocks, place) for mine, place in places]


def host_pages(
    kv_caches: dict[str, torch.Tensor],
    layer_names: Sequence[str],
    layout: ChunkLayout,
    num_blocks: int,
    place: tuple[int, int, bool] = (0, 1, True),
) -> HostPages:
    """Maps the registered tensors: [block][head][token][K, V], of which only the first two dimensions are looked into. `place`: the
    first shard, how many, and whether this worker stores them. Raises UnsupportedError when they are not what vLLM declared."""
    first, heads, stores = place
    bases: list[list[int]] = [[] for _ in range(heads)]
    strides = []
    for name in layer_names:
        tensor = kv_caches.get(name)
        if tensor is None:
            raise UnsupportedError(f"vLLM declared a KV cache for layer {name} but registered none")
        view = tensor.unsqueeze(1) if heads == 1 and tensor.dim() == 3 else tensor  # latent attention has no heads
        inside = view[0, 0]
        size = inside.numel() * view.element_size()
        if view.shape[:2] != (num_blocks, heads) or size != layout.block_bytes or not inside.is_contiguous():
            raise UnsupportedError(
                f"layer {name}: KV cache of shape {tuple(tensor.shape)}, strides {tensor.stride()} is not "
                f"{num_blocks} blocks of {heads} heads, each {layout.block_bytes} contiguous bytes, as declared; "
                "pdserve does not guess layouts. Report this vLLM version and backend."
            )
        for head in range(heads):
            bases[head].append(view[0, head].data_ptr())
        strides.append(view.stride(0) * view.element_size())
    return HostPages(
        bases,
        strides,
        layout.block_bytes,
        num_blocks,
        first_shard=first,
        stores=stores,
        rounding=(layout.payload, layout.kv_dtype, layout.row_values) if layout.payload else None,
    )

"""Pipeline parallelism: which of the model's layers a worker has, and how they fall on the chunk's layer groups."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from pdserve.errors import ConfigError, UnsupportedError
from pdserve.transfer.wire import MAX_SHARDS

_KEY = "cache.layer_groups"


def check_supported(vllm_config: Any, layer_names: Sequence[str]) -> None:
    """Raises UnsupportedError where not all stages' reports reach the scheduler, or where a stage's layers are not known for sure.
    vLLM gives its scheduler the names of the first stage's layers, and each worker those of its own stage."""
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size == 1:
        return
    if parallel.distributed_executor_backend != "mp":
        raise UnsupportedError(
            f"pipeline_parallel_size > 1 with distributed_executor_backend {parallel.distributed_executor_backend}: not every stage's "
            "report reaches the scheduler there. Use mp."
        )
    _check_names(layer_names, *span(vllm_config, _stage(parallel)))


def workers(vllm_config: Any) -> int:
    """Of one engine: each has its own heads of its own layers."""
    parallel = vllm_config.parallel_config
    return int(parallel.tensor_parallel_size * parallel.pipeline_parallel_size)


def total_layers(vllm_config: Any, layer_names: Sequence[str], layer_groups: int) -> int:
    """Layers of the whole model."""
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return int(vllm_config.model_config.get_total_num_hidden_layers())
    if layer_groups > 1:
        _check_names(layer_names, 0, len(layer_names))
    return len(layer_names)


def check_groups(vllm_config: Any, layers: int, heads: int, layer_groups: int) -> None:
    """Raises ConfigError unless each stage has whole groups of equally many layers."""
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if not isinstance(layer_groups, int) or layer_groups < 1:
        raise ConfigError(_KEY, f"{layer_groups!r} is not a positive number", "Leave it out, or use a number from 1.")
    if layers % layer_groups:
        fix = f"Use one of {', '.join(str(n) for n in range(1, layers + 1) if layers % n == 0)}."
        raise ConfigError(_KEY, f"the model's {layers} layers do not make {layer_groups} equal groups", fix)
    if heads * layer_groups > MAX_SHARDS:
        problem = f"{layer_groups} groups of {heads} KV heads are more than {MAX_SHARDS} shards a chunk"
        raise ConfigError(_KEY, problem, f"Use at most {MAX_SHARDS // heads}.")
    ends = [span(vllm_config, stage)[1] for stage in range(stages)] if stages > 1 else [layers]
    if any(end % (layers // layer_groups) for end in ends):
        raise ConfigError(
            _KEY,
            f"{layer_groups} group(s) of {layers // layer_groups} layers do not fit pipeline_parallel_size {stages}, whose stages end "
            f"behind {', '.join(map(str, ends))} layers",
            f"Set it to {layers // math.gcd(*ends)} for every engine that shares this cache.",
        )


def parts(
    vllm_config: Any, layer_names: Sequence[str], layers: int, layer_groups: int
) -> list[tuple[int, Sequence[str]]]:
    """(layer group, its layers' names) of each group that this worker has."""
    start = span(vllm_config, _stage(vllm_config.parallel_config))[0] if len(layer_names) < layers else 0
    size = layers // layer_groups
    return [((start + at) // size, layer_names[at : at + size]) for at in range(0, len(layer_names), size)]


def span(vllm_config: Any, stage: int) -> tuple[int, int]:
    """(first layer, the one behind the last) of a stage: vLLM's own division."""
    from vllm.distributed.utils import get_pp_indices

    layers = vllm_config.model_config.get_total_num_hidden_layers()
    start, end = get_pp_indices(layers, stage, vllm_config.parallel_config.pipeline_parallel_size)
    return int(start), int(end)


def _stage(parallel: Any) -> int:
    return int(parallel.rank // parallel.tensor_parallel_size % parallel.pipeline_parallel_size)


def _check_names(layer_names: Sequence[str], start: int, end: int) -> None:
    numbers = [[int(n) for n in re.findall(r"(?<=\.)\d+(?=\.)", name)] for name in layer_names]
    if numbers != [[n] for n in range(start, end)]:
        raise UnsupportedError(
            f"vLLM declares KV for the layers {', '.join(layer_names)}, not for each of the layers {start} to {end - 1} in order, so their "
            "places in a chunk's layer groups are not known (a draft model, or layers that share KV?). "
            "Use pipeline_parallel_size 1 and leave cache.layer_groups out."
        )

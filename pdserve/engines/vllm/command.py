"""Topology -> the `vllm serve` command line and its environment. Pure; fits `Command` in engines/base.py."""

from __future__ import annotations

import json
from pathlib import Path

from pdserve.engines.vllm import lines
from pdserve.launching import Context
from pdserve.topology import CPU_KV_GIB, KV_ROLES, Engine, Instance

# A unix socket's path may have 107 characters; vLLM adds 37.
MAX_SOCKET_FOLDER = 70


def argv(instance: Instance, context: Context) -> list[str]:
    engine = instance.engine
    command = [context.script("vllm"), "serve", context.model.source]
    command += ["--served-model-name", context.served_model_name]
    command += ["--host", instance.host, "--port", str(instance.port)]
    command += _engine_flags(engine)
    # Without it usage.prompt_tokens_details is null, and nobody can see what the cache saved.
    command += ["--enable-prompt-tokens-details"]
    connector = kv_transfer_config(instance, context) if has_connector(instance, context) else engine.kv_transfer_config
    if connector:
        command += ["--kv-transfer-config", json.dumps(connector, separators=(",", ":"))]
    if context.otlp_traces and instance.role != "plain":
        command += ["--otlp-traces-endpoint", context.otlp_traces]
    return [*command, *engine.extra_args]


def environment(instance: Instance, context: Context) -> dict[str, str]:
    """Variables added to the launcher's own. PYTHONHASHSEED is left alone: our keys do not depend on it."""
    variables = {
        # The working directory must not be importable: a folder called `kernels` there would break transformers.
        "PYTHONSAFEPATH": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if context.log_format == "json":
        variables |= {"PDSERVE_LOG_FORMAT": "json", "PDSERVE_INSTANCE": instance.name, "VLLM_LOGGING_CONFIG_PATH": str(lines.CONFIG)}
    if (sockets := sockets_folder(instance, context)) is not None:
        variables["VLLM_RPC_BASE_PATH"] = str(sockets)
    if context.model.local:
        variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if instance.engine.device == "cpu":
        if instance.cpus:
            # vLLM's own choice sets cores aside for a KV transfer and, on few cores, puts all engines on the same ones.
            variables["VLLM_CPU_OMP_THREADS_BIND"] = instance.cpus
        variables["VLLM_CPU_KVCACHE_SPACE"] = str(instance.engine.kv_cache_space_gib or CPU_KV_GIB)
    elif instance.gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in instance.gpus)
    if context.otlp_traces and instance.role != "plain":
        variables |= {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_SERVICE_NAME": instance.name}
    return variables | instance.engine.env


def sockets_folder(instance: Instance, context: Context) -> Path | None:
    """Where vLLM's processes meet. It leaves its sockets behind, by default in the temporary folder, one more with each start.
    None where their paths would become longer than a socket's may be."""
    folder = context.run_dir / "sockets" / instance.name
    return folder if len(str(folder)) <= MAX_SOCKET_FOLDER else None


def ready_url(instance: Instance, context: Context) -> str:
    return f"{instance.url}/health"


def has_connector(instance: Instance, context: Context) -> bool:
    return context.cache_socket is not None and instance.role in KV_ROLES


def kv_transfer_config(instance: Instance, context: Context) -> dict[str, object]:
    extra: dict[str, object] = {"pdserve.socket": str(context.cache_socket), "pdserve.instance": instance.name}
    if context.cache_load != "adaptive":
        extra["pdserve.load"] = context.cache_load
    if context.cache_patience != 1:
        extra["pdserve.patience"] = context.cache_patience
    if context.cache_payload:
        extra["pdserve.payload"] = context.cache_payload
    if context.layer_groups > 1:
        extra["pdserve.layer_groups"] = context.layer_groups
    if instance.engine.second_context is not None:
        extra["pdserve.second_context"] = instance.engine.second_context
    if instance.engine.load_share is not None:
        extra["pdserve.load_share"] = instance.engine.load_share
    return {
        "kv_connector": "PdserveConnector",
        "kv_connector_module_path": "pdserve.engines.vllm.connector",
        "kv_role": KV_ROLES[instance.role],
        # A load that fails is computed instead; vLLM's default would fail the request.
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def _engine_flags(engine: Engine) -> list[str]:
    flags = ["--dtype", engine.dtype, "--tensor-parallel-size", str(engine.tensor_parallel_size)]
    if engine.pipeline_parallel_size > 1:
        flags += ["--pipeline-parallel-size", str(engine.pipeline_parallel_size)]
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
        value = getattr(engine, name)
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    if engine.gpu_memory_utilization is not None:
        flags += ["--gpu-memory-utilization", f"{engine.gpu_memory_utilization:g}"]
    eager = engine.enforce_eager if engine.enforce_eager is not None else engine.device == "cpu"
    if eager:
        flags += ["--enforce-eager"]
    if engine.enable_prefix_caching is not None:
        flags += ["--enable-prefix-caching" if engine.enable_prefix_caching else "--no-enable-prefix-caching"]
    return flags

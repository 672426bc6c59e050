"""The topology YAML: read, checked, turned into frozen structs. Every error names the key path, the value and the fix.

Three steps: YAML to plain data (duplicate keys are refused), plain data to structs (unknown keys, types, ranges), then
the rules that span keys (ports, roles, GPUs). Nothing here looks at the machine; deploy/preflight.py does.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

from pdserve.errors import ConfigError

Port = Annotated[int, Meta(ge=1, le=65535)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]

ROLES = ("prefill", "decode", "both", "plain")
KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "both": "kv_both"}
MIN_CACHE = 64 << 20
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
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] | None = None
    kv_cache_space_gib: Positive | None = None  # CPU only (else gpu_memory_utilization); None: CPU_KV_GIB
    enforce_eager: bool | None = None  # None: yes on the CPU (compiling takes minutes there and gains nothing)
    enable_prefix_caching: bool | None = None
    start_timeout: Seconds = 900.0
    extra_args: tuple[str, ...] = ()
    env: dict[str, str] = {}


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One engine of the deployment, with the `engine` section and its own overrides merged."""

    role: str
    index: int
    host: str
    port: int
    gpus: tuple[int, ...]
    cpus: str
    engine: Engine

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"

    @property
    def key(self) -> str:
        """Where it stands in the YAML."""
        return f"{self.role}[{self.index}]"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


class Cache(msgspec.Struct, frozen=True, kw_only=True):
    size: int  # bytes
    chunk_tokens: Annotated[int, Meta(ge=16, multiple_of=16)] = 256
    admin_host: str = "127.0.0.1"
    admin_port: Port = 8080


class Proxy(msgspec.Struct, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    port: Port = 8000
    policy: Literal["round_robin", "least_load"] = "round_robin"
    prefill_timeout: Seconds | None = None
    extra_args: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{host}:{self.port}"


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    model: str
    served_model_name: str | None
    instances: tuple[Instance, ...]
    cache: Cache | None
    proxy: Proxy | None
    source: str = ""  # the file it came from; relative model paths count from its folder

    def of(self, role: str) -> tuple[Instance, ...]:
        return tuple(instance for instance in self.instances if instance.role == role)

    def uses_cache(self, instance: Instance) -> bool:
        """`plain` engines never load the connector; nobody does when the deployment has no cache."""
        return self.cache is not None and instance.role in KV_ROLES


# --- the file as written: the same keys, every engine key also allowed on an instance ----------------

_Override = msgspec.defstruct(
    "_Override",
    [
        ("port", Port),
        ("host", str, "127.0.0.1"),
        ("gpus", tuple[Annotated[int, Meta(ge=0)], ...], ()),
        ("cpus", int | str, ""),
        *((f.name, f.type | msgspec.UnsetType, msgspec.UNSET) for f in msgspec.structs.fields(Engine)),
    ],
    frozen=True,
    kw_only=True,
)


class _CacheFile(Cache, frozen=True, kw_only=True):
    size: int | str  # type: ignore[assignment]


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


_SECTIONS: dict[str, type] = {"engine": Engine, "cache": _CacheFile, "proxy": Proxy, **dict.fromkeys(ROLES, _Override)}


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
    raw = _read_yaml(text)
    _refuse_unknown_keys(raw)
    try:
        file = msgspec.convert(raw, _File, strict=True)
    except msgspec.ValidationError as error:
        raise _explain(error, raw) from None
    topology = _build(file, source)
    _check_roles(topology)
    _check_ports(topology)
    for instance in topology.instances:
        _check_instance(topology, instance)
    _check_gpus(topology)
    return topology


# --- step 1: YAML ------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML would silently keep the last)."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if isinstance(key, str) and key in seen:
            raise ConfigError(key, f"given twice (again in line {key_node.start_mark.line + 1})", "Keep one of them.")
        seen.add(key if isinstance(key, str) else None)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _read_yaml(text: str) -> dict[str, Any]:
    try:
        raw = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError("", f"not valid YAML: {where}{problem}") from error
    if not isinstance(raw, dict):
        kind = "empty" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError("", f"the topology must be a mapping of keys, this file is {kind}", "See deploy/topologies.")
    return raw


# --- step 2: keys, types, ranges ---------------------------------------------------------------------


def _refuse_unknown_keys(raw: dict[str, Any]) -> None:
    _check_keys("", raw, _File)
    for section, struct in _SECTIONS.items():
        value = raw.get(section)
        if isinstance(value, dict):
            _check_keys(section, value, struct)
        elif isinstance(value, list):
            for i, entry in enumerate(value):
                if isinstance(entry, dict):
                    _check_keys(f"{section}[{i}]", entry, struct)


def _check_keys(path: str, raw: dict[Any, Any], struct: type) -> None:
    known = [field.name for field in msgspec.structs.fields(struct)]
    for key in raw:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            fix = f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(known)}."
            where = f"{path}.{key}" if path else str(key)
            raise ConfigError(where, "unknown key", _misplaced(path, str(key)) or fix)


def _misplaced(path: str, key: str) -> str:
    """An engine key at the top is the most likely slip; say where it goes."""
    if not path and key in [field.name for field in msgspec.structs.fields(Engine)]:
        return f"It belongs under engine: (engine.{key}) or to one engine (prefill[0].{key})."
    return ""


_TYPE_WORDS = {
    "int": "an integer",
    "str": "text",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping of keys",
}
_VALUE_WORDS = {
    int: "a number",
    str: "text",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    type(None): "empty",
}


def _explain(error: msgspec.ValidationError, raw: dict[str, Any]) -> ConfigError:
    """msgspec says "Expected `int`, got `str` - at `$.decode[0].port`"; we say the path, the value and the fix."""
    message, _, where = str(error).partition(" - at `$")
    path = where.rstrip("`").lstrip(".")
    missing = re.fullmatch(r"Object missing required field `(\w+)`", message)
    if missing:
        return ConfigError(f"{path}.{missing[1]}".lstrip("."), "missing", _MISSING_FIX.get(missing[1], "Add it."))
    value = _value_at(raw, path.replace("[...]", ""))
    if path.endswith("[...]") and isinstance(value, dict):  # a mapping with free keys: name the one that is wrong
        wrong = next(key for key, entry in value.items() if not isinstance(entry, str))
        path, value = f"{path[:-5]}.{wrong}", value[wrong]
    expected = re.match(r"Expected `([^`]+)`(?:, got|$)", message)
    if expected:
        kinds = [kind.strip() for kind in expected[1].split("|")]
        wanted = " or ".join(_TYPE_WORDS.get(kind, kind) for kind in kinds if kind != "null")
        fix = "Put it in quotes." if wanted == "text" and isinstance(value, int | float) else f"Give {wanted}."
        return ConfigError(path, f"{value!r} is {_VALUE_WORDS.get(type(value), type(value).__name__)}", fix)
    if message.startswith("Invalid enum value"):
        known = _choices(path)
        close = difflib.get_close_matches(str(value), known, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        return ConfigError(path, f"{value!r} is not known", f"{hint}Known: {', '.join(known)}.")
    if "matching regex" in message:
        return ConfigError(path, f"{value!r} is not a name", "Use small letters, digits and dashes, 40 at most.")
    return ConfigError(path, f"{value!r} is out of range", _range_fix(message))


def _range_fix(message: str) -> str:
    """ "Expected `int` <= 65535" -> "Give an integer <= 65535."."""
    bound = re.sub(r"Expected `(\w+)`", lambda m: f"Give {_TYPE_WORDS.get(m[1], m[1])}", message)
    return bound.replace("that's a", "that is a") + "."


_MISSING_FIX = {
    "name": "Give the deployment a name, e.g. name: local-cpu.",
    "model": "Give demo, a hub id or a folder, e.g. model: demo.",
    "port": "Give each engine a port, e.g. port: 8100.",
    "size": "Give the cache a size, e.g. size: 2GiB.",
}


def _choices(path: str) -> list[str]:
    field = path.rsplit(".", 1)[-1]
    fields = (*msgspec.structs.fields(Engine), *msgspec.structs.fields(Proxy))
    hint = next((f.type for f in fields if f.name == field), None)
    return [str(choice) for choice in getattr(hint, "__args__", ())]


def _value_at(raw: Any, path: str) -> Any:
    """The value at a path such as `decode[0].port`; the nearest that exists when it ends in something unnamed."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        try:
            raw = raw[int(index)] if index else raw[name]
        except (KeyError, IndexError, TypeError):
            return raw
    return raw


def parse_size(value: int | str, key: str) -> int:
    """Bytes of "2GiB", "512MiB", "1.5 GiB", "2GB" or a plain number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", str(value).strip())
    if not match:
        raise ConfigError(key, f"{value!r} is not a size", "Write a number and a unit, e.g. 2GiB or 512MiB.")
    unit = match[2] or ""
    power = "KMGT".index(unit[0]) + 1 if unit else 0
    return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power)


# --- step 3: structs and the rules between keys ------------------------------------------------------


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
                    host=written.host,
                    port=written.port,
                    gpus=written.gpus,
                    cpus=str(written.cpus),
                    engine=engine,
                )
            )
    cache = None
    if file.cache is not None:
        given = {name: getattr(file.cache, name) for name in Cache.__struct_fields__}
        cache = Cache(**{**given, "size": parse_size(file.cache.size, "cache.size")})
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
        source=source,
    )


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
    if topology.cache is None and any(instance.engine.kind != "fake" for instance in producers):
        fix = "Add one, e.g. cache: {size: 2GiB}."
        raise ConfigError("cache", "missing, but prefill and decode hand their KV over through it", fix)
    if topology.cache and not (producers or both):
        raise ConfigError("cache", "no engine uses it", "Remove it, or list engines under prefill and decode, or both.")
    if topology.cache and topology.cache.size < MIN_CACHE:
        raise ConfigError(
            "cache.size", f"{topology.cache.size} bytes is too small to be of use", "Give at least 64MiB."
        )


def _check_ports(topology: Topology) -> None:
    users: dict[int, str] = {}
    wanted = [(instance.port, instance.key, f"{instance.key}.port") for instance in topology.instances]
    if topology.cache:
        wanted.append((topology.cache.admin_port, "cache", "cache.admin_port"))
    if topology.proxy:
        wanted.append((topology.proxy.port, "proxy", "proxy.port"))
    for port, user, key in wanted:
        if port in users:
            raise ConfigError(key, f"{port} is used by {users[port]}", "Give each process a port of its own.")
        users[port] = user


# Flags that the launcher sets itself: given again in extra_args they would silently win or contradict the topology.
_OUR_FLAGS = ("--host", "--port", "--served-model-name", "--kv-transfer-config", "--model")


def _check_instance(topology: Topology, instance: Instance) -> None:
    engine, key = instance.engine, instance.key
    for argument in engine.extra_args:
        if argument.split("=", 1)[0] in _OUR_FLAGS:
            raise ConfigError(
                f"{key}.extra_args", f"{argument!r} is set by pdserve", "Remove it; use the topology's key."
            )
    if engine.device == "cpu":
        if instance.gpus:
            raise ConfigError(
                f"{key}.gpus", f"{list(instance.gpus)} with device cpu", "Remove it, or set device: cuda."
            )
        if engine.gpu_memory_utilization is not None:
            fix = "Use kv_cache_space_gib on the CPU."
            raise ConfigError(f"{key}.gpu_memory_utilization", "has no meaning with device cpu", fix)
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
    if instance.gpus and len(instance.gpus) != engine.tensor_parallel_size:
        problem = (
            f"{list(instance.gpus)} is {len(instance.gpus)}, but tensor_parallel_size is {engine.tensor_parallel_size}"
        )
        raise ConfigError(f"{key}.gpus", problem, "List one GPU per rank.")


def _check_cpus(instance: Instance) -> None:
    key, text = f"{instance.key}.cpus", instance.cpus
    ranks = text.split("|")
    if not all(re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", rank) for rank in ranks):
        raise ConfigError(
            key, f"{text!r} is not a list of cores", 'Write "0", "0-3", "0,2", or "0-1|2-3" for two ranks.'
        )
    wanted = instance.engine.tensor_parallel_size
    if len(ranks) != wanted:
        problem = f"{text!r} is for {len(ranks)} rank(s), but tensor_parallel_size is {wanted}"
        raise ConfigError(key, problem, "Separate the cores of each rank by |, e.g. 0|1.")


def _check_gpus(topology: Topology) -> None:
    """Two engines may share a GPU only when their shares of its memory add up to no more than all of it."""
    used: dict[int, tuple[float, str]] = {}
    for instance in topology.instances:
        share = instance.engine.gpu_memory_utilization or 0.9
        for gpu in instance.gpus:
            taken, user = used.get(gpu, (0.0, ""))
            if taken + share > 1.0 + 1e-9:
                fix = "Give each its own GPU, or lower gpu_memory_utilization of both."
                raise ConfigError(f"{instance.key}.gpus", f"{gpu} is used by {user}", fix)
            used[gpu] = (taken + share, instance.key)

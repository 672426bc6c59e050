"""Topology -> the exact list of processes to run. Pure: `pdserve launch --dry-run` prints what this returns."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from pdserve import env, model, secret, topology_hosts, trace
from pdserve.deploy import hosts
from pdserve.deploy.hosts import Elsewhere
from pdserve.engines import command
from pdserve.launching import Context
from pdserve.topology import Cache, Instance, Proxy, Topology

CACHE_START_SECONDS = 300.0  # every page of the arena is touched before the cache is ready
PROXY_START_SECONDS = 60.0


@dataclass(frozen=True)
class Process:
    """One process, complete: nothing is decided after this."""

    name: str
    role: str  # cache, prefill, decode, both, plain, proxy
    argv: tuple[str, ...]
    env: dict[str, str]  # added to the launcher's own
    url: str
    ready_url: str
    log: Path
    cwd: Path
    depends: tuple[str, ...] = ()  # ready before this one is started
    start_timeout: float = 900.0
    leftovers: tuple[Path, ...] = ()  # files and folders to remove once it is gone, in case it could not
    folders: tuple[Path, ...] = ()  # made before it starts
    host: str = ""  # where there are several
    awaits: tuple[Elsewhere, ...] = ()  # processes of other hosts, ready before this one is started
    hidden: frozenset[str] = frozenset()  # variables in `env` whose values are never shown

    def shell(self) -> str:
        """As one would type it, but for passwords."""
        words = [f"{key}={shlex.quote(value)}" for key, value in sorted(self.shown_env().items())]
        return " ".join([*words, shlex.join(self.argv)])

    def shown_env(self) -> dict[str, str]:
        return {key: "..." if key in self.hidden else value for key, value in self.env.items()}


@dataclass(frozen=True)
class Plan:
    """What runs here. With several hosts `topology` is this host's part; `whole` is all of it."""

    topology: Topology
    context: Context
    run_dir: Path
    processes: tuple[Process, ...]
    whole: Topology
    host: str = ""
    elsewhere: tuple[Elsewhere, ...] = ()

    @property
    def url(self) -> str:
        """Where a client goes: the proxy, else the first engine."""
        proxy = self.whole.proxy
        return proxy.url if proxy else self.whole.instances[0].url

    @property
    def label(self) -> str:
        """The deployment's name, and the host's where there are several."""
        return hosts.label(self.whole, self.host)


def make(
    topology: Topology,
    cores: list[int],
    python: str = sys.executable,
    run_root: Path | None = None,
    host: str = "",
) -> Plan:
    """`cores` are those this machine lets us use; engines on the CPU that name none share them. `host`: plan that one's part.

    Raises ConfigError when the topology has hosts and none is named.
    """
    host = hosts.chosen(topology, host)
    whole = topology
    topology = topology_hosts.only(topology, host) if host else topology
    label = hosts.label(whole, host)
    run_dir = (run_root or env.run_root()) / label
    base = Path(topology.source).parent if topology.source else None
    found = model.resolve(topology.model, base)
    context = Context(
        model=found,
        served_model_name=topology.served_model_name or found.served_name,
        python=python,
        run_dir=run_dir,
        cache_socket=run_dir / "cache.sock" if topology.cache else None,
        cache_load=topology.cache.load if topology.cache else "adaptive",
        cache_patience=topology.cache.patience if topology.cache else 1.0,
        cache_payload=topology.cache.payload if topology.cache else "",
        layer_groups=whole.layer_groups,
        has_proxy=whole.proxy is not None,
        otlp_traces=trace.endpoint(whole.tracing.endpoint) if whole.tracing else "",
        log_format=env.log_format(),
    )
    topology = msgspec.structs.replace(topology, instances=_assign(topology.instances, cores))
    processes = []
    if topology.cache:
        peers = hosts.peer_words(whole, host, str(run_dir / "state.json"))
        peers += whole.tracing.words if whole.tracing else []
        processes.append(_cache(label, hosts.cache_name(host), topology.cache, context, peers))
    after_cache = tuple(process.name for process in processes)
    elsewhere = hosts.elsewhere(whole, host)
    engines = [_engine(instance, context, after_cache) for instance in topology.instances]
    processes += engines
    if topology.proxy:
        behind = tuple(engine.name for engine in engines if engine.role != "plain")
        awaits = tuple(e for e in elsewhere if e.role not in ("plain", "cache"))
        caches = hosts.admin_urls(whole, host)
        processes.append(_proxy(whole, topology.proxy, context, (*after_cache, *behind), caches, awaits))
    processes = [replace(process, host=host) for process in processes] if host else processes
    return Plan(topology, context, run_dir, tuple(processes), whole, host, elsewhere)


def make_all(
    topology: Topology, cores: dict[str, list[int]], python: str = sys.executable, run_root: Path | None = None
) -> Plan:
    """The processes of every host in one plan, for a backend that reaches them all. `cores` by host."""
    parts = [make(topology, cores[h.name], python, run_root, h.name) for h in topology.hosts]
    engines = tuple(p.name for part in parts for p in part.processes if p.role not in ("cache", "proxy", "plain"))
    found = []
    for process in (p for part in parts for p in part.processes):
        if process.role == "proxy":  # it need not look for them over the network: the same supervisor starts them
            process = replace(process, awaits=(), depends=tuple(dict.fromkeys((*process.depends, *engines))))
        found.append(process)
    run_dir = (run_root or env.run_root()) / topology.name
    return Plan(topology, parts[0].context, run_dir, tuple(found), topology)


def arena_file(name: str) -> Path:
    return Path(f"/dev/shm/pdserve-{name}.arena")


def _assign(instances: tuple[Instance, ...], cores: list[int]) -> tuple[Instance, ...]:
    """Gives cores or GPUs to the engines that name none: equal shares, in order, those named by others left out."""
    unbound = [i for i in instances if i.engine.device == "cpu" and not i.cpus]
    named = {core for i in instances for core in expand_cores(i.cpus)}
    free = [core for core in cores if core not in named] or cores
    share = max(1, len(free) // max(1, len(unbound)))
    taken_gpus = {gpu for i in instances for gpu in i.gpus}
    assigned, turn, next_gpu = [], 0, 0
    for instance in instances:
        ranks = instance.engine.ranks
        if instance.engine.device == "cpu" and not instance.cpus and free:
            mine = [free[(turn * share + n) % len(free)] for n in range(share)]
            turn += 1
            instance = msgspec.structs.replace(instance, cpus=_bind(mine, ranks))
        elif instance.engine.device == "cuda" and not instance.gpus:
            gpus: list[int] = []
            while len(gpus) < ranks:
                if next_gpu not in taken_gpus:
                    gpus.append(next_gpu)
                next_gpu += 1
            instance = msgspec.structs.replace(instance, gpus=tuple(gpus))
        assigned.append(instance)
    return tuple(assigned)


def _bind(cores: list[int], ranks: int) -> str:
    """vLLM's spelling: the cores of one rank by commas, ranks by |. With fewer cores than ranks, ranks share."""
    per_rank = max(1, len(cores) // ranks)
    groups = [[cores[(rank * per_rank + n) % len(cores)] for n in range(per_rank)] for rank in range(ranks)]
    return "|".join(",".join(str(core) for core in group) for group in groups)


def expand_cores(text: str) -> list[int]:
    """ "0-2,5|7" -> [0, 1, 2, 5, 7]"""
    cores: list[int] = []
    for part in text.replace("|", ",").split(","):
        first, _, last = part.partition("-")
        if first:
            cores.extend(range(int(first), int(last or first) + 1))
    return cores


def _log(context: Context, name: str) -> Path:
    return context.run_dir / "logs" / f"{name}.log"


def _pdserve(context: Context, *words: str) -> tuple[str, ...]:
    # -P: the working directory is never importable.
    return (context.python, "-P", "-m", "pdserve", *words)


def _cache(label: str, name: str, cache: Cache, context: Context, peers: list[str]) -> Process:
    admin = cache.admin_url
    words = ["cache", "serve", "--name", label, "--socket", str(context.cache_socket), "--size", str(cache.size)]
    words += ["--chunk-tokens", str(cache.chunk_tokens)]
    if cache.policy != "lru":
        words += ["--policy", cache.policy]
    if cache.disk:
        folder = context.run_dir / (Path(cache.disk.path).expanduser() if cache.disk.path else "kv")
        words += ["--disk", str(folder), "--disk-size", str(cache.disk.size)]
        words += ["--disk-min-free", str(cache.disk.min_free), "--disk-write", cache.disk.write]
    passwords: dict[str, str] = {}
    for i, url in enumerate(cache.tiers):  # no password on a command line: everybody can read those
        shown, found = secret.moved_to(url, f"PDSERVE_TIER_{i}_PASSWORD")
        passwords |= found
        words += ["--tier", shown]
    words += ["--admin-host", cache.admin_host, "--admin-port", str(cache.admin_port), *peers]
    return Process(
        name=name,
        role="cache",
        argv=_pdserve(context, *words),
        env={"PYTHONSAFEPATH": "1", **passwords},
        hidden=frozenset(passwords),
        url=admin,
        ready_url=f"{admin}/healthz",
        log=_log(context, name),
        cwd=context.run_dir,
        start_timeout=CACHE_START_SECONDS,
        leftovers=(
            *(arena_file(label).with_suffix(suffix) for suffix in (".arena", ".journal", ".journal.new")),
            context.run_dir / "cache.sock",
        ),
    )


def _engine(instance: Instance, context: Context, depends: tuple[str, ...]) -> Process:
    engine = command(instance.engine.kind)
    sockets = engine.sockets_folder(instance, context)
    folders = (sockets,) if sockets is not None else ()
    return Process(
        name=instance.name,
        role=instance.role,
        argv=tuple(engine.argv(instance, context)),
        env=engine.environment(instance, context),
        url=instance.url,
        ready_url=engine.ready_url(instance, context),
        log=_log(context, instance.name),
        cwd=context.run_dir,
        depends=depends if instance.role != "plain" else (),
        start_timeout=instance.engine.start_timeout,
        leftovers=folders,
        folders=folders,
    )


def _proxy(
    topology: Topology,
    proxy: Proxy,
    context: Context,
    depends: tuple[str, ...],
    caches: dict[str, str],
    awaits: tuple[Elsewhere, ...],
) -> Process:
    words = ["proxy", "--host", proxy.host, "--port", str(proxy.port)]
    for role in ("prefill", "decode", "both"):
        for instance in topology.of(role):
            words += [f"--{role}", f"{instance.name}={instance.url}"]
    for name, url in caches.items():
        words += ["--cache", f"{name}={url}"]
    for instance in topology.instances:
        if instance.on and topology.uses_cache(instance):
            words += ["--place", f"{instance.name}={instance.on}"]
    words += ["--state-file", str(context.run_dir / "state.json")]
    words += ["--model", context.served_model_name, "--policy", proxy.policy]
    words += ["--engine", next(i.engine.kind for i in topology.instances if i.role != "plain")]
    for flag, value in (
        ("--prefill-policy", proxy.prefill_policy),
        ("--decode-policy", proxy.decode_policy),
        ("--workers", proxy.workers if proxy.workers > 1 else None),
        ("--pd-min-tokens", proxy.pd_min_tokens or None),
        ("--slo-ttft", proxy.slo_ttft),
        ("--slo-itl", proxy.slo_itl),
        *(("--slo-class", targets.words(name)) for name, targets in proxy.slo_classes.items()),
        ("--api-keys", proxy.api_keys),
    ):
        words += [flag, f"{value:g}" if isinstance(value, float) else str(value)] if value is not None else []
    words += ["--pd-adaptive"] if proxy.pd_adaptive else []
    words += ["--early-decode"] if proxy.early_decode else []
    words += ["--early-token"] if proxy.early_token else []
    if proxy.prefill_timeout is not None:
        words += ["--prefill-timeout", f"{proxy.prefill_timeout:g}"]
    return Process(
        name="proxy",
        role="proxy",
        argv=_pdserve(context, *words, *(topology.tracing.words if topology.tracing else ()), *proxy.extra_args),
        env={"PYTHONSAFEPATH": "1"},
        url=proxy.url,
        ready_url=f"{proxy.url}/health",
        log=_log(context, "proxy"),
        cwd=context.run_dir,
        depends=depends,
        awaits=awaits,
        start_timeout=PROXY_START_SECONDS,
    )

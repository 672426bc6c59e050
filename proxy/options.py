"""The proxy's command line and the settings it becomes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from urllib.parse import urlsplit

from pdserve import env, log, trace
from pdserve.errors import ConfigError
from pdserve.proxy import slo
from pdserve.proxy.lifetime import Deadlines
from pdserve.proxy.slo import Classes, SloClass

ROLES = ("prefill", "decode", "both")


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the app needs to know. `instances` are (name, role, url)."""

    instances: tuple[tuple[str, str, str], ...]
    models: frozenset[str] = frozenset()
    engine: str = "vllm"
    prefill_policy: str = "round_robin"
    decode_policy: str = "round_robin"
    pd_min_tokens: int = 0
    pd_max_queue: int = 0
    pd_adaptive: bool = False
    deadlines: Deadlines = field(default_factory=Deadlines)
    max_body: int = 64 * 1024 * 1024
    max_head: int = 64 * 1024
    max_connections: int = 20_000
    api_keys: str = ""
    api_keys_env: str = ""
    admin_token: str = ""
    early_decode: bool = False
    early_token: bool = False
    slo_ttft: float = 0.0
    slo_itl: float = 0.0
    slo_classes: tuple[str, ...] = ()
    workers: int = 1
    max_waiting: int = 256
    probe_every: float = 1.0
    state_file: str = ""  # where the launcher writes how its processes are
    otlp_endpoint: str = ""  # where spans go; none are made without
    trace_sample: float = 1.0
    caches: tuple[tuple[str, str], ...] = ()  # (name, admin URL) of the hosts' cache daemons
    places: tuple[tuple[str, str], ...] = ()  # (instance, its host), where there are several hosts

    @property
    def classes(self) -> Classes:
        return slo.parsed(self.slo_classes, SloClass(ttft=self.slo_ttft, itl=self.slo_itl))


EXAMPLES = """examples:
  pdserve proxy --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
  pdserve proxy --both gpu0=http://127.0.0.1:8300 gpu1=http://127.0.0.1:8301 --policy prefix --port 8000
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pdserve proxy`."""
    parser.epilog = EXAMPLES
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default %(default)s)")
    for role, what in zip(ROLES, ("producers: prefill only", "consumers: decode", "engines that do both"), strict=True):
        help_ = f"{what}; [NAME=]URL, several may follow, and the option may be repeated"
        parser.add_argument(f"--{role}", nargs="+", action="extend", default=[], metavar="[NAME=]URL", help=help_)
    log.add_argument(parser)
    trace.add_arguments(parser)
    text = "a cache daemon's admin address: [NAME=]URL, several may follow, and the option may be repeated"
    parser.add_argument("--cache", nargs="+", action="extend", default=[], metavar="[NAME=]URL", help=text)
    text = "the host that an engine runs on, where there are several: what is prefilled is sent ahead to the consumer's"
    parser.add_argument("--place", action="append", default=[], metavar="NAME=HOST", help=text)
    text = "the launcher's state.json, from which /dashboard shows restarts"
    parser.add_argument("--state-file", default="", metavar="PATH", help=text)
    parser.add_argument("--model", action="append", default=[], metavar="NAME", help="served model name (repeatable)")
    parser.add_argument("--engine", default="vllm", help="what the engines are (default %(default)s)")
    parser.add_argument("--policy", default="round_robin", help="how an instance is chosen (default %(default)s)")
    for leg, whom in (("prefill", "producer"), ("decode", "consumer")):
        parser.add_argument(f"--{leg}-policy", help=f"how a {whom} is chosen (default: as --policy)")
    text = "prompts with fewer uncached tokens are prefilled by the consumer (default %(default)s: never)"
    parser.add_argument("--pd-min-tokens", type=int, default=0, metavar="N", help=text)
    text = "consumers prefill themselves while every producer has N requests (default %(default)s: never)"
    parser.add_argument("--pd-max-queue", type=int, default=0, metavar="N", help=text)
    text = "measure first tokens with and without a producer, and let the consumer prefill where that is sooner"
    parser.add_argument("--pd-adaptive", action="store_true", help=text)
    text = "send the decode leg while the prefill still runs: it waits on its consumer for the chunks, as they come"
    parser.add_argument("--early-decode", action="store_true", help=text)
    text = "hand the producer's own first token on at once, where that gives the same answer; the consumer goes on behind it"
    parser.add_argument("--early-token", action="store_true", help=text)
    text = "processes that share the port; SIGHUP replaces them without dropping a stream (default %(default)s)"
    parser.add_argument("--workers", type=int, default=1, metavar="N", help=text)
    parser.add_argument("--max-body-mib", type=int, default=64, help="largest request body (default %(default)s)")
    parser.add_argument("--max-head-kib", type=int, default=64, help="largest head of a request (default %(default)s)")
    text = "connections of clients at once (default %(default)s)"
    parser.add_argument("--max-connections", type=int, default=20_000, metavar="N", help=text)
    parser.add_argument("--api-keys", default="", metavar="FILE", help="the proxy's own keys, hashed (proxy/keys.py)")
    text = "target for the first token; what cannot meet it waits or is refused (default: no target)"
    parser.add_argument("--slo-ttft", type=float, default=0.0, metavar="SECONDS", help=text)
    text = "target for the time between tokens; streams are limited so that it is met (default: no target)"
    parser.add_argument("--slo-itl", type=float, default=0.0, metavar="SECONDS", help=text)
    text = "a class of requests with targets of its own: NAME:ttft=0.5,itl=0.05,priority=0 (repeatable; proxy/slo.py)"
    parser.add_argument("--slo-class", action="append", default=[], metavar="NAME:...", help=text)
    text = "requests that may wait for their turn under a target (default %(default)s)"
    parser.add_argument("--max-waiting", type=int, default=256, metavar="N", help=text)
    for deadline in fields(Deadlines):
        flag = f"--{deadline.name}-timeout"
        parser.add_argument(flag, type=float, default=deadline.default, metavar="SECONDS", help="default %(default)g s")


def settings(args: argparse.Namespace) -> Settings:
    """Checks the arguments. Raises ConfigError."""
    instances: list[tuple[str, str, str]] = []
    for role in ROLES:
        for n, text in enumerate(getattr(args, role)):
            name, url = named(text, f"{role}-{n}")
            if any(name == known for known, _, _ in instances):
                raise ConfigError(f"--{role}", f"the name {name!r} is used twice", "Give each instance its own name.")
            instances.append((name, role, url))
    if not any(role != "prefill" for _, role, _ in instances):
        raise ConfigError("--decode", "no engine is given that can answer a request", "Add --decode URL or --both URL.")
    seconds: dict[str, float] = {f.name: getattr(args, f"{f.name}_timeout") for f in fields(Deadlines)}
    for name, value in seconds.items():
        if not value > 0:
            raise ConfigError(f"--{name}-timeout", f"{value:g} is not a positive number of seconds")
    for flag in ("max_body_mib", "max_head_kib", "max_connections", "workers"):
        if getattr(args, flag) <= 0:
            raise ConfigError(f"--{flag.replace('_', '-')}", f"{getattr(args, flag)} is not positive")
    slo.parsed(args.slo_class, SloClass())
    return Settings(
        tuple(instances),
        caches=_caches(args.cache),
        otlp_endpoint=trace.endpoint(args.otlp_endpoint),
        trace_sample=args.trace_sample,
        places=_places(args.place, [name for name, _, _ in instances]),
        state_file=args.state_file,
        models=frozenset(args.model),
        engine=args.engine,
        prefill_policy=args.prefill_policy or args.policy,
        decode_policy=args.decode_policy or args.policy,
        pd_min_tokens=args.pd_min_tokens,
        pd_max_queue=args.pd_max_queue,
        pd_adaptive=args.pd_adaptive,
        early_decode=args.early_decode,
        early_token=args.early_token,
        deadlines=Deadlines(**seconds),
        max_head=args.max_head_kib * 1024,
        max_connections=args.max_connections,
        api_keys=args.api_keys,
        admin_token=env.admin_token(),
        workers=args.workers,
        slo_ttft=args.slo_ttft,
        slo_itl=args.slo_itl,
        slo_classes=tuple(args.slo_class),
        api_keys_env=env.api_keys(),
        max_waiting=args.max_waiting,
        max_body=args.max_body_mib * 1024 * 1024,
    )


def _places(texts: Sequence[str], known: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """What --place names. Raises ConfigError."""
    found: dict[str, str] = {}
    for text in texts:
        name, _, host = text.partition("=")
        if name not in known or not host:
            fix = f"Write NAME=HOST; the instances are {', '.join(known)}."
            raise ConfigError("--place", f"{text!r} does not name an instance and its host", fix)
        found[name] = host
    return tuple(found.items())


def _caches(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """What --cache names: like instances, but asked for facts only. Raises ConfigError."""
    found: dict[str, str] = {}
    for n, text in enumerate(texts):
        name, url = named(text, f"cache-{n}" if n else "cache")
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError("--cache", f"{url!r} is no http:// address", "Give the daemon's admin URL.")
        if name in found:
            raise ConfigError("--cache", f"the name {name!r} is used twice", "Give each daemon its own name.")
        found[name] = url.rstrip("/")
    return tuple(found.items())


def named(text: str, default: str) -> tuple[str, str]:
    """Takes [NAME=]URL apart. A "=" behind "://" belongs to the URL."""
    name, equals, url = text.partition("=")
    return (name, url) if equals and "://" not in name and name else (default, text)


def parse(argv: Sequence[str]) -> Settings:
    """For tests and tools: the settings that a command line gives."""
    parser = argparse.ArgumentParser(prog="pdserve proxy")
    add_arguments(parser)
    return settings(parser.parse_args(argv))

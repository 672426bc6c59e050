"""The proxy's command line and the settings it becomes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from pdserve.errors import ConfigError
from pdserve.proxy.lifetime import Deadlines

ROLES = ("prefill", "decode", "both")


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the app needs to know. `instances` are (name, role, url)."""

    instances: tuple[tuple[str, str, str], ...]
    models: frozenset[str] = frozenset()
    engine: str = "vllm"
    policy: str = "round_robin"
    deadlines: Deadlines = field(default_factory=Deadlines)
    max_body: int = 64 * 1024 * 1024
    probe_every: float = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pdserve proxy`."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default %(default)s)")
    for role, what in zip(ROLES, ("producers: prefill only", "consumers: decode", "engines that do both"), strict=True):
        help_ = f"{what}; [NAME=]URL, several may follow, and the option may be repeated"
        parser.add_argument(f"--{role}", nargs="+", action="extend", default=[], metavar="[NAME=]URL", help=help_)
    parser.add_argument("--model", action="append", default=[], metavar="NAME", help="served model name (repeatable)")
    parser.add_argument("--engine", default="vllm", help="what the engines are (default %(default)s)")
    parser.add_argument("--policy", default="round_robin", help="how an instance is chosen (default %(default)s)")
    parser.add_argument("--max-body-mib", type=int, default=64, help="largest request body (default %(default)s)")
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
    if args.max_body_mib <= 0:
        raise ConfigError("--max-body-mib", f"{args.max_body_mib} is not positive")
    models, max_body = frozenset(args.model), args.max_body_mib * 1024 * 1024
    return Settings(tuple(instances), models, args.engine, args.policy, Deadlines(**seconds), max_body)


def named(text: str, default: str) -> tuple[str, str]:
    """Takes [NAME=]URL apart. A "=" behind "://" belongs to the URL."""
    name, equals, url = text.partition("=")
    return (name, url) if equals and "://" not in name and name else (default, text)


def parse(argv: Sequence[str]) -> Settings:
    """For tests and tools: the settings that a command line gives."""
    parser = argparse.ArgumentParser(prog="pdserve proxy")
    add_arguments(parser)
    return settings(parser.parse_args(argv))

"""Workload name -> its module, imported late. A workload is a module with

HELP                     one line
add_arguments(parser)    its options, with the names and defaults of the tool that users know it from
make(args) -> Plan       pure: the same options and --seed give the same plan; --scale shrinks every length
"""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType
from typing import NoReturn

from pdserve.bench.plan import Plan
from pdserve.errors import ConfigError

NAMES = (
    "long-doc-qa",
    "multi-round-qa",
    "chat-docs",
    "doc-analysis",
    "rag",
    "sharegpt",
    "cache-rate",
    "working-set",
    "random",
    "all-hit",
    "pd-interference",
    "trace-replay",
)


def module(name: str) -> ModuleType:
    if name not in NAMES:
        raise ConfigError("workload", f"{name!r} is not known", f"Known: {', '.join(NAMES)}.")
    return importlib.import_module(f"pdserve.bench.workloads.{name.replace('-', '_')}")


def make(name: str, args: argparse.Namespace) -> Plan:
    """The plan, checked: lengths and counts positive, something to send."""
    for key, value in vars(args).items():
        if isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
            raise ConfigError(f"--{key.replace('_', '-')}", f"{value:g} is negative")
    plan: Plan = module(name).make(args)
    return plan


class _Words(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(self.prog, message, f"pdserve bench {self.prog} --help lists its options.")


def plan_of(name: str, words: list[str] | None = None, **overrides: object) -> Plan:
    """A workload's plan without the command line: its defaults, `words` as options, then `overrides`."""
    parser = _Words(prog=name)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0)
    module(name).add_arguments(parser)
    args = parser.parse_args(words or [])
    for key, value in overrides.items():
        if not hasattr(args, key):
            raise ConfigError(key, f"{name} has no such option")
        setattr(args, key, value)
    return make(name, args)


def add_inflight(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--max-inflight-requests",
        metavar="N",
        type=int,
        default=default,
        help="requests at a time (default %(default)s)",
    )


def add_conversation_pace(parser: argparse.ArgumentParser) -> None:
    """How fast the users of a chat workload ask."""
    parser.add_argument(
        "--think",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds between an answer and the next question (default %(default)s)",
    )
    add_inflight(parser, 4)


def scaled(tokens: int | float, args: argparse.Namespace, least: int = 1) -> int:
    """A length in tokens under --scale."""
    return max(least, round(tokens * args.scale))

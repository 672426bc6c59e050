"""The list of commands and how a parser is made for one of them, or for all (help pages, completion, the test of style).

A command is a module with `add_arguments(parser)`, `main(args) -> exit code` and EXAMPLES, imported when it is named.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import NoReturn

COMMANDS = {
    "launch": ("pdserve.cli_launch", "start a topology and keep it running"),
    "status": ("pdserve.cli_status", "list every process of what runs"),
    "stop": ("pdserve.cli_stop", "stop a deployment, or clean up after one that was killed"),
    "logs": ("pdserve.cli_logs", "show what all processes say, in order of time"),
    "explain": ("pdserve.cli_explain", "say where a request's time went and why a chunk was missing"),
    "doctor": ("pdserve.cli_doctor", "check a machine, a topology or a deployment; say what to fix"),
    "verify": ("pdserve.verify", "compare the answers with plain vLLM's"),
    "demo": ("pdserve.demo", "start the CPU topology, send requests, show what came of them"),
    "bench": ("pdserve.bench", "run a workload against a server or in arms, compare, report"),
    "size": ("pdserve.cli_size", "simulate a recorded load on engines and tiers, and say what to buy"),
    "model": ("pdserve.cli_model", "fetch the demo model"),
    "topology": ("pdserve.cli_topology", "list, check and describe topology files"),
    "cache": ("pdserve.cli_cache", "run the cache daemon of this host, or ask it"),
    "proxy": ("pdserve.proxy.app", "run the proxy by hand"),
    "completion": ("pdserve.cli_completion", "print the script with which a shell completes pdserve's words"),
}

#: every code that a command may end with; docs/cli.md and `pdserve --help` are made from it
EXIT_CODES = {
    0: "it worked; doctor: nothing to fix",
    1: "it did not work, or a check failed; the message says why",
    2: "a setting, a flag or this machine is not as it must be; nothing started",
    3: "what it should talk to does not run or does not answer",
    4: "doctor: it works, with warnings",
    130: "stopped by Ctrl-C",
}

EXAMPLES = """examples:
  pdserve launch local-cpu             a producer, a consumer, cache, proxy
  pdserve launch my.yaml --dry-run     the exact processes, not started
  pdserve doctor my.yaml               will it run here, and what to change
  pdserve status --json
  pdserve verify local-cpu
"""


class Parser(argparse.ArgumentParser):
    """argparse's errors in pdserve's way: one line, exit code 2. Help keeps the lines of the examples."""

    def __init__(self, **kwargs: object) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def module(name: str) -> ModuleType:
    return importlib.import_module(COMMANDS[name][0])


def parser(name: str, prog: str = "pdserve") -> Parser:
    """The parser of one command; imports its module."""
    description, examples = _words(name)
    made = Parser(prog=f"{prog} {name}", description=description, epilog=examples)
    module(name).add_arguments(made)
    return made


def _words(name: str) -> tuple[str, str | None]:
    """What stands above the options, and below."""
    text = COMMANDS[name][1]
    return f"{text[0].upper()}{text[1:]}.", getattr(module(name), "EXAMPLES", None)


def whole() -> Parser:
    """All commands in one parser: what completion and the documentation are made from. Imports every module."""
    top = Parser(prog="pdserve", description=about(), epilog=epilog())
    top.add_argument("--version", action="store_true", help="print the version and end")
    below = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, (_, text) in COMMANDS.items():
        description, examples = _words(name)
        module(name).add_arguments(below.add_parser(name, help=text, description=description, epilog=examples))
    return top


def walk(top: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and all below it, each once, in order."""
    yield top
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            seen: set[int] = set()
            for sub in action.choices.values():
                if id(sub) not in seen:
                    seen.add(id(sub))
                    yield from walk(sub)


def about() -> str:
    return inspect.cleandoc(sys.modules["pdserve"].__doc__ or "")


def epilog(codes: Mapping[int, str] = EXIT_CODES) -> str:
    lines = "\n".join(f"  {code:<4} {text}" for code, text in codes.items())
    return f"exit codes:\n{lines}\n\n{EXAMPLES}"

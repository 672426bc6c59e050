"""docs/cli.md: every command with its help, made from the parsers; the environment variables from env.py; the exit codes."""

from __future__ import annotations

import argparse
import inspect
import re

from pdserve import cli_tree, env

_HEAD = """<!-- Made by `make docs-generate` from the parsers. Do not edit. -->
# Commands

`pdserve COMMAND --help` says the same. Everything that prints data takes `--json`; tables fit 80 columns; what takes more
than two seconds shows its progress on a terminal; `NO_COLOR` is honoured. Data goes to stdout, everything else to stderr.

## Exit codes

| code | meaning |
|---|---|
CODES
## Completion in your shell

```sh
source <(pdserve completion bash)      # or zsh, fish; `pdserve completion --help` says where to keep it
```

## Environment

| variable | meaning |
|---|---|
VARIABLES
"""


def page() -> str:
    codes = "".join(f"| {code} | {text} |\n" for code, text in cli_tree.EXIT_CODES.items())
    head = _HEAD.replace("CODES", codes).replace("VARIABLES", "".join(_variables()))
    parts = [_entry(parser) for parser in cli_tree.walk(cli_tree.whole()) if parser.prog != "pdserve"]
    return head + "\n".join(parts)


def _variables() -> list[str]:
    """One row for each function of env.py: its first sentence begins with the variable's name."""
    rows = []
    for _, function in inspect.getmembers(env, inspect.isfunction):
        found = re.match(r"(PDSERVE_\w+): (.*)", " ".join(inspect.getdoc(function).split()))  # type: ignore[union-attr]
        if found and function.__module__ == env.__name__:
            rows.append(f"| `{found[1]}` | {found[2].replace('<', '&lt;')} |\n")
    return sorted(rows)


def _entry(parser: argparse.ArgumentParser) -> str:
    """A heading of its own for each command and each action, so that a page can point at it."""
    level = "##" if parser.prog.count(" ") == 1 else "###"
    return f"{level} {parser.prog}\n\n```text\n{parser.format_help().rstrip()}\n```\n"

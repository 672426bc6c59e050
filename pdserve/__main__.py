"""The `pdserve` command. Each part is imported when its command is named: `pdserve proxy` needs no launcher, and so on.

A command is a module with `add_arguments(parser)` and `main(args) -> exit code`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from typing import NoReturn

from pdserve import __version__
from pdserve.errors import PdserveError

COMMANDS = {
    "launch": ("pdserve.cli_launch", "start a topology and keep it running"),
    "status": ("pdserve.cli_status", "list every process of what runs"),
    "stop": ("pdserve.cli_stop", "stop a deployment, or clean up after one that was killed"),
    "verify": ("pdserve.verify", "compare the answers with plain vLLM's"),
    "demo": ("pdserve.demo", "start the CPU topology, send requests, show what came of them"),
    "bench": ("pdserve.bench", "measure a running deployment"),
    "model": ("pdserve.cli_model", "fetch the demo model"),
    "cache": ("pdserve.cli_cache", "run the cache daemon of this host, or ask it"),
    "proxy": ("pdserve.proxy.app", "run the proxy by hand"),
}

EPILOG = """exit codes:
  0  it worked            1  it did not; the message says why
  2  a setting or this machine is not as it must be; nothing was started
  130  stopped by Ctrl-C

examples:
  pdserve launch local-cpu             one producer, one consumer, cache and proxy on the CPU
  pdserve launch my.yaml --dry-run     the exact processes, without starting them
  pdserve status --json
  pdserve verify local-cpu
"""


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    try:
        return _run(words)
    except PdserveError as error:
        print(f"pdserve: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `pdserve status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(words: list[str]) -> int:
    top = _Parser(
        prog="pdserve", description=_about(), epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"pdserve {__version__}")
    listed = "\n".join(f"  {name:8} {text}" for name, (_, text) in COMMANDS.items())
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=f"one of: {', '.join(COMMANDS)}")
    top.description = f"{_about()}\n\ncommands (pdserve COMMAND --help says more):\n{listed}"
    if not words:
        top.print_help()
        return 2
    name = words[0]
    top.parse_args(words[:1])
    path, text = COMMANDS[name]
    module = importlib.import_module(path)
    parser = _Parser(
        prog=f"pdserve {name}",
        description=text[0].upper() + text[1:] + ".",
        epilog=getattr(module, "EXAMPLES", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    code: int = module.main(parser.parse_args(words[1:]))
    return code


def _about() -> str:
    return inspect.cleandoc(sys.modules["pdserve"].__doc__ or "")


class _Parser(argparse.ArgumentParser):
    """argparse's errors in pdserve's way: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    sys.exit(main())

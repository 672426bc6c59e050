"""The `pdserve` command. Each part is imported when its command is named: `pdserve proxy` needs no launcher, and so on."""

from __future__ import annotations

import os
import sys

from pdserve import __version__, cli_tree
from pdserve.cli_tree import COMMANDS
from pdserve.errors import PdserveError

__all__ = ["COMMANDS", "main"]


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
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
    about = f"{cli_tree.about()}\n\ncommands (pdserve COMMAND --help says more):\n{listed}"
    top = cli_tree.Parser(prog="pdserve", description=about, epilog=cli_tree.epilog())
    top.add_argument("--version", action="version", version=f"pdserve {__version__}")
    top.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands above")
    if not words:
        top.print_help()
        return 2
    name = words[0]
    top.parse_args(words[:1])
    module = cli_tree.module(name)
    rest = module.default_words(words[1:]) if hasattr(module, "default_words") else words[1:]
    code: int = module.main(cli_tree.parser(name).parse_args(rest))
    return code


if __name__ == "__main__":
    sys.exit(main())

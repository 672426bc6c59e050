"""What was found, for people (80 columns) and for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from pdserve import output
from pdserve.doctor.finding import ORDER, Finding, exit_code, worst


def as_json(title: str, findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "subject": title,
        "status": worst(findings),
        "exit_code": exit_code(findings),
        "findings": [finding.as_json() for finding in findings],
    }


def show(title: str, findings: Sequence[Finding], quiet: bool = False) -> None:
    """One line for each finding; below a warning or a failure what it means and what to do. `quiet`: those alone."""
    console = output.console()
    console.print(Text(f"Looked at {title}."))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        bad = finding.status in ("warn", "fail")
        if quiet and not bad:
            continue
        text = Text(finding.found)
        if bad:
            text.append(f"\n{finding.means}", "dim")
            text.append("\nfix: ", "bold")
            text.append(finding.fix)
        table.add_row(Text(finding.status, output.STYLES[finding.status]), finding.check, text)
    console.print(table)
    counts = Counter(finding.status for finding in findings)
    console.print(", ".join(f"{counts[status]} {status}" for status in ORDER if counts[status]))

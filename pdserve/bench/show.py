"""Results on a terminal or in a pipe: one table, one sentence per metric, what a reader must know."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from pdserve import output
from pdserve.bench import compare as comparing
from pdserve.bench import results
from pdserve.bench.results import Result
from pdserve.bench.summary import groups, summarise


def result(found: Result, as_json: bool = False) -> None:
    if as_json:
        output.print_json(as_data(found))
        return
    print(f"\n{found.workload}, seed {found.seed}")
    columns = comparing.columns(found)
    for group in [None, *_several(found)]:
        rows = comparing.rows(found, group)
        if rows:
            print(f"\n{group or 'all requests'}" if group is not None or len(_several(found)) else "")
            print_table(columns, rows)
    if len(found.arms) > 1:
        focus = comparing.focus(found)
        print(f"\n{focus}" if focus else "")
        for verdict in comparing.verdicts(found, focus):
            print(verdict.sentence)
    for sentence in comparing.disturbance(found):
        print(sentence)
    for run in found.runs:
        if run.carried_users is not None:
            carried = (
                f"{run.carried_users} users kept TTFT p95 <= {found.slo:g} s"
                if run.carried_users
                else "no period kept the target"
            )
            print(f"{run.arm or 'ramp'} #{run.repetition}: {carried}")
    for sentence in [*comparing.failures(found), *found.notes]:
        print(sentence)


def _several(found: Result) -> list[str]:
    names = groups(found.records)
    return names if len(names) > 1 else []


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Lines that fit what they are; a table this wide folded into 80 columns could not be read."""
    widths = [max(len(columns[i]), *(len(row[i]) for row in rows)) for i in range(len(columns))]
    for row in (columns, *rows):
        cells = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def as_data(found: Result) -> dict[str, Any]:
    """The figures without the raw records."""
    names = _several(found)

    def of(arm: str, group: str | None) -> dict[str, Any] | None:
        summary = summarise([r for r in found.of(arm) if group in (None, r.group)], found.timeout, found.slo)
        return summary.as_dict() if summary else None

    arms = {arm: {"all": of(arm, None), **{name: of(arm, name) for name in names}} for arm in found.arms}
    return {
        "workload": found.workload, "command": found.command, "seed": found.seed, "machine": found.machine,
        "versions": found.versions, "overhead": found.overhead, "arms": arms, "notes": found.notes,
        "failures": comparing.failures(found),
        "verdicts": [asdict(v) for v in comparing.verdicts(found, comparing.focus(found))],
        "runs": [{"arm": r.arm, "repetition": r.repetition, "carried_users": r.carried_users} for r in found.runs],
    }  # fmt: skip


def compare(args: argparse.Namespace) -> int:
    """`pdserve bench compare A.json B.json`."""
    a, b = results.read(args.a), results.read(args.b)
    names = (args.a.stem, args.b.stem) if args.a.stem != args.b.stem else (str(args.a), str(args.b))
    result(comparing.merged(a, b, names), args.json)
    return 0

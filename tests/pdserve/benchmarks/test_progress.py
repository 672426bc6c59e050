from __future__ import annotations

import io
import re

import pytest

from pdserve.bench.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [40, 80])
def test_a_line_fits_the_terminal_that_it_is_written_over_on(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    progress = Progress(out, "long-doc-qa of a name that is long in itself")
    progress.show("query round with even more words than there is room for")
    progress.end()
    lines = re.split(r"\r\x1b\[2K|\n", out.getvalue())
    assert len(lines) == 4
    assert max(map(len, lines)) == columns - 1


def test_a_file_gets_whole_lines() -> None:
    out = io.StringIO()
    Progress(out, "x" * 200).show("y" * 200)
    assert len(out.getvalue()) > 400
    assert out.getvalue().count("\n") == 1
    quiet = io.StringIO()
    Progress(quiet, "x", quiet=True).end()
    assert quiet.getvalue() == ""

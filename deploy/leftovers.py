"""Removing what a process left behind."""

from __future__ import annotations

import shutil
from pathlib import Path


def remove(path: Path) -> None:
    """A file or a whole folder; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

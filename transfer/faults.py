"""Points at which a test may stop, kill or delay the process. In production each is a call of a function that does nothing.

A part that has such points takes a `fault` argument; it is never set from a flag, a file or the environment.
"""

from __future__ import annotations

from collections.abc import Callable

Fault = Callable[[str], None]

#: every label there is; the crash tests go through all of them
LABELS = (
    "store.commit",
    "journal.append",
    "journal.compact.write",
    "journal.compact.rename",
    "disk.put.begin",
    "disk.put.written",
    "disk.segment.created",
    "disk.compact.read",
    "disk.compact.moved",
    "disk.compact.unlink",
    "disk.delete",
    "disk.index.write",
    "disk.index.rename",
    "promote.begin",
    "promote.read",
    "promote.publish",
)


def none(label: str) -> None:
    """The hook of production."""

"""Rules of a tier's end: it leaves nothing behind and takes nothing more."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from pdserve.transfer.tiers.base import TierError
from pdserve.transfer.tiers.conformance.subject import PATIENCE_S, Subject, eventually, make_chunk, opened, read, works


def closing_ends_threads_and_files(subject: Subject) -> None:
    with opened(subject) as tier:  # what a library opens once and for all is not counted
        works(tier)
    if subject.leaves_threads:
        return
    files, threads = _open_files(), threading.active_count()
    for _ in range(3):
        with opened(subject) as tier:
            assert works(tier)
        tier.close()  # twice is once
    assert eventually(lambda: threading.active_count() <= threads, PATIENCE_S), "threads are left"
    assert eventually(lambda: _open_files() <= files, PATIENCE_S), "files or sockets are left"


def after_close_it_refuses(subject: Subject) -> None:
    with opened(subject) as tier:
        record, _ = make_chunk(100)
    try:
        found = read(tier, record)
    except TierError:
        return
    assert found is None


def _open_files() -> int:
    return len(os.listdir(Path("/proc/self/fd")))

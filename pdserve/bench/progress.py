"""What a run shows while it runs: how far it is, and the first tokens and gaps of the last answers."""

from __future__ import annotations

import shutil
import time
from collections import deque
from typing import TextIO

from pdserve.bench.record import Record
from pdserve.bench.summary import quantile

RECENT = 50
TERMINAL_EVERY, FILE_EVERY = 0.5, 10.0


class Progress:
    """A line that is written over on a terminal, and a line now and then in a file."""

    def __init__(self, out: TextIO, label: str, quiet: bool = False) -> None:
        self._out, self._label, self._quiet = out, label, quiet
        self._terminal = out.isatty()
        self._firsts: deque[float] = deque(maxlen=RECENT)
        self._gaps: deque[float] = deque(maxlen=RECENT * 20)
        self._done = self._failed = 0
        self._begin = self._shown = time.monotonic()

    def on_record(self, record: Record) -> None:
        self._done += 1
        self._failed += not record.ok
        if record.ttft_ms is not None:
            self._firsts.append(record.ttft_ms)
        self._gaps.extend(record.itl_ms)
        if time.monotonic() - self._shown > (TERMINAL_EVERY if self._terminal else FILE_EVERY):
            self.show(record.stage)

    def show(self, stage: str) -> None:
        if self._quiet:
            return
        self._shown = time.monotonic()
        text = f"{self._label} {stage}: {self._shown - self._begin:.0f} s, {self._done} done, {self._failed} failed"
        if self._firsts:
            text += f", TTFT p50 {_ms(quantile(self._firsts, 0.5))} p99 {_ms(quantile(self._firsts, 0.99))}"
        if self._gaps:
            text += f", ITL p50 {_ms(quantile(self._gaps, 0.5))} p99 {_ms(quantile(self._gaps, 0.99))}"
        width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be written over
        self._out.write(f"\r\x1b[2K{text[:width]}" if self._terminal else f"{text}\n")
        self._out.flush()

    def end(self, stage: str = "") -> None:
        self.show(stage or "end")
        if self._terminal and not self._quiet:
            self._out.write("\n")


def _ms(value: float) -> str:
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.1f} ms"

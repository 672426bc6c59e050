"""Which cores the copying threads run on."""

from __future__ import annotations

import os


def any_core() -> None:
    """CPU vLLM binds its process to the cores that compute, and a thread inherits that: a copy would always take turns
    with the computation, while another core may be idle."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))

"""The one place that says which vLLM pdserve supports, and what to tell who runs another."""

from __future__ import annotations

import re

from pdserve.errors import UnsupportedError

MINIMUM = (0, 26)
BELOW = (0, 33)
TESTED = "0.26.0 (CUDA) and 0.32.0 (CPU)"


def check(version: str) -> None:
    """Raises UnsupportedError when `version` (e.g. "0.32.0+cpu") is outside the supported range."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found:
        raise UnsupportedError(
            f"vLLM reports the version {version!r}, which is not understood. pdserve supports {range_text()}."
        )
    if not MINIMUM <= (int(found[1]), int(found[2])) < BELOW:
        raise UnsupportedError(
            f"vLLM {version} is outside the supported range {range_text()} (tested with {TESTED}). "
            f"Install one inside it: pip install 'pdserve[vllm]' (CUDA) or 'pdserve[cpu]'."
        )


def range_text() -> str:
    return f">={MINIMUM[0]}.{MINIMUM[1]},<{BELOW[0]}.{BELOW[1]}"

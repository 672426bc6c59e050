"""The fake engine speaks vLLM's dialect, so that the code under test is the code that ships."""

from __future__ import annotations

from pdserve.engines.vllm.dialect import *  # noqa: F403 - all of it, as __all__ there lists it

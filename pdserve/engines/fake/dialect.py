"""The fake engine speaks vLLM's dialect, so that the code under test is the code that ships."""

from __future__ import annotations

from pdserve.engines.vllm.dialect import (
    cached_tokens,
    decode_body,
    prefill_body,
    read_handover,
    tell_cached,
    together,
    why_local,
)

__all__ = ["cached_tokens", "decode_body", "prefill_body", "read_handover", "tell_cached", "together", "why_local"]

"""The fake engine speaks vLLM's dialect, so that the code under test is the code that ships."""

from __future__ import annotations

from pdserve.engines.vllm.dialect import decode_body, prefill_body, read_handover, together, why_local

__all__ = ["decode_body", "prefill_body", "read_handover", "together", "why_local"]

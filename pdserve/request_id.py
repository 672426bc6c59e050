"""Engines' names for a request, and the client's id in them. Pure."""

from __future__ import annotations

import re

#: vLLM's: the endpoint's word, the client's id, for completions the prompt's number, eight random digits
_VLLM = tuple(re.compile(p) for p in (r"^cmpl-(.+)-\d+-[0-9a-f]{8}$", r"^cmpl-(.+)-\d+$", r"^chatcmpl-(.+?)(?:-[0-9a-f]{8})?$"))


def client_id(name: str) -> str:
    """The client's id of an engine's request; what is none of an engine's names is taken for the client's."""
    return next((found[1] for pattern in _VLLM if (found := pattern.match(name))), name)

"""Whether a process answers over HTTP, asked without any proxy of the environment."""

from __future__ import annotations

import urllib.error
import urllib.request


def answers(url: str, seconds: float) -> bool:
    """200 within that time."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=seconds) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False

"""What makes two models the same for the cache: their configuration and the content of their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blake3 import blake3

#: read from each weight file: its start (the tensor table of safetensors) and this many pieces spread over it
_HEAD_BYTES = 1 << 20
_SAMPLES = 64
_SAMPLE_BYTES = 4096
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
#: fields of a model's configuration that say where it came from, not what it computes
_PLACES = frozenset({"_name_or_path", "name_or_path", "transformers_version", "_commit_hash"})


def of_config(config: dict[str, Any], *extra: str) -> str:
    """Digest of a model configuration (paths and versions left out) and of whatever else changes the numbers."""
    h = blake3(json.dumps({k: v for k, v in config.items() if k not in _PLACES}, sort_keys=True, default=str).encode())
    for part in extra:
        h.update(b"\0" + part.encode())
    return h.hexdigest()[:32]


def of_weights(folder: Path) -> str | None:
    """Sampled digest of the weight files in `folder`; None when there are none.

    Reads each file's length, its first MiB and 64 pieces of 4 KiB: two fine-tunes of one model differ in nearly every
    piece, and 100 GB of weights take well under a second.
    """
    files = next((found for pattern in _WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
    if not files:
        return None
    h = blake3()
    for path in files:
        size = path.stat().st_size
        h.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as f:
            h.update(f.read(_HEAD_BYTES))
            for i in range(_SAMPLES):
                f.seek(size * i // _SAMPLES)
                h.update(f.read(_SAMPLE_BYTES))
    return h.hexdigest()[:32]

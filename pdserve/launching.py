"""What an engine's command.py is told about the deployment it is started in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pdserve.model import Model


@dataclass(frozen=True)
class Context:
    """The same for every engine of one deployment. What differs (port, cores, GPUs) is on the topology's Instance."""

    model: Model
    served_model_name: str
    python: str  # the interpreter that runs pdserve; engines come from the same environment
    run_dir: Path
    cache_socket: Path | None  # None: this deployment has no cache
    has_proxy: bool = True
    otlp_traces: str = ""  # where engines send their spans, path included
    cache_load: str = "adaptive"  # the topology's cache.load
    cache_patience: float = 1.0  # the topology's cache.patience
    cache_payload: str = ""  # the topology's cache.payload
    layer_groups: int = 1  # of a chunk
    log_format: str = "text"

    def script(self, name: str) -> str:
        """An entry point of this environment, such as `vllm`; PATH could lead to another one's."""
        return str(Path(self.python).parent / name)

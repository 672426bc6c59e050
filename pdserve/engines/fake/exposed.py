"""The fake engine's /metrics: those of vLLM's and of the connector's names that others read, in vLLM's form."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pdserve.engines.fake.server import FakeEngine

# Of each token that a producer handed over: what loading it would have taken, and what computing it.
_LOAD_SECONDS, _SAVED_SECONDS = 2e-5, 4e-4
_BLOCKS = 64  # requests that would fill its cache, if it had one


def page(engine: FakeEngine) -> str:
    running = engine.running - 1 + engine.others  # the one that asks is no request
    tokens = engine.tokens
    families = (
        ("vllm:num_requests_running", "gauge", "", running),
        ("vllm:num_requests_waiting", "gauge", "", 0),
        ("vllm:kv_cache_usage_perc", "gauge", "", min(1.0, running / _BLOCKS)),
        ("vllm:prompt_tokens_total", "counter", "", tokens["prompt"]),
        ("vllm:generation_tokens_total", "counter", "", tokens["generated"]),
        ("pdserve_engine_loaded_tokens_total", "counter", 'tier="dram",', tokens["loaded"]),
        ("pdserve_engine_load_seconds_total", "counter", "", tokens["loaded"] * _LOAD_SECONDS),
        ("pdserve_engine_saved_seconds_total", "counter", "", tokens["loaded"] * _SAVED_SECONDS),
        ("process_start_time_seconds", "gauge", None, engine.born),
    )
    lines = []
    for name, kind, labels, value in families:
        shown = "" if labels is None else f'{{{labels}model_name="{engine.model}"}}'
        lines += [f"# HELP {name} As vLLM's.", f"# TYPE {name} {kind}", f"{name}{shown} {float(value)}"]
    return "\n".join(lines) + "\n"

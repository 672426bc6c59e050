"""The systems that pdserve is compared with, where they are installed: what they need beside vLLM, and a sentence where they are not."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from pdserve import env
from pdserve.errors import StartError

LMCACHE_VERSION = "0.5.6"
LMCACHE_PARTS = "aiofile caio aiofiles sortedcontainers nvtx redis opentelemetry-exporter-prometheus"
START_SECONDS = 120.0
STOP_SECONDS = 15.0


def lmcache_folder() -> Path | None:
    """Where LMCache is: beside the environment (its dependencies fight with vLLM's), or in it."""
    beside = env.home() / "bench" / f"lmcache-{LMCACHE_VERSION}"
    if (beside / "lmcache").is_dir():
        return beside
    found = find_spec("lmcache")
    return (
        Path(next(iter(found.submodule_search_locations))).parent
        if found and found.submodule_search_locations
        else None
    )


def missing(arm: str) -> str:
    """What is not installed that the arm needs, as a sentence with the fix; "" if nothing."""
    if arm == "lmcache" and lmcache_folder() is None:
        target = env.home() / "bench" / f"lmcache-{LMCACHE_VERSION}"
        fix = f"pip install --no-deps --target {target} lmcache=={LMCACHE_VERSION} {LMCACHE_PARTS}"
        return f"lmcache is not installed. Install it beside the environment: {fix}"
    if arm == "nixl" and find_spec("nixl") is None:
        return "nixl is not installed. Install it with: pip install --no-deps nixl==1.5.1 nixl-cu12==1.5.1"
    return ""


def environment(arm: str) -> dict[str, str]:
    """Variables that the arm's engines need."""
    if arm != "lmcache":
        return {}
    paths = os.pathsep.join(filter(None, (str(lmcache_folder()), os.environ.get("PYTHONPATH"))))
    # LMCache's own sockets lie beside vLLM's and have longer names, too long for the folder of a run.
    place = {"VLLM_RPC_BASE_PATH": tempfile.gettempdir()}
    return {"PYTHONPATH": paths, "PYTHONHASHSEED": "0", "LMCACHE_TRACK_USAGE": "false", **place}


def fault(arm: str, logs: Path) -> str:
    """Why the arm is not what it is called, by its engines' logs; empty where it is. LMCache that cannot start leaves plain vLLM."""
    if arm != "lmcache":
        return ""
    for log in sorted(logs.glob("*.log")):
        _, found, rest = log.read_text(errors="replace").partition("Failed to initialize LMCache")
        if found:
            why = next((line for line in rest.splitlines() if re.search(r"\b\w*(Error|Exception): ", line)), "see there")
            return f"LMCache did not start, its engine is plain vLLM ({log}): {why.strip()}"
    return ""


def has_server(arm: str, raw: dict[str, Any]) -> bool:
    """Whether the arm needs a process beside its engines: LMCache's multi-process mode."""
    connector = (raw.get("engine") or {}).get("kv_transfer_config") or {}
    return arm == "lmcache" and connector.get("kv_connector") == "LMCacheMPConnector"


def lmcache_version() -> str:
    folder = lmcache_folder()
    found = (
        [d.version for d in metadata.distributions(path=[str(folder)]) if d.metadata["Name"] == "lmcache"]
        if folder
        else []
    )
    return found[0] if found else "of an unknown version"


def remarks(arm: str, on_cpu: bool) -> list[str]:
    """What a reader of the figures must know about how the other system was run."""
    if arm == "lmcache" and not on_cpu:
        return [f"LMCache {lmcache_version()}, in process (LMCacheConnectorV1), chunks of 256, pinned memory."]
    if arm == "lmcache":
        return [f"LMCache {lmcache_version()}, MP mode, chunks of 256, LRU, shared memory, engine-driven transfer."]
    if arm == "offloading":
        return ["OffloadingConnector: vLLM's own, with its defaults (LRU, prompts only), as many bytes as cache.size."]
    if arm == "nixl":
        found = find_spec("nixl_cu12")
        places = list(found.submodule_search_locations or []) if found else []
        api = [Path(place) / "_api.py" for place in places]
        if any("pthrDelay = 0\n" in file.read_text() for file in api if file.exists()):
            return [
                "NIXL's progress thread polls without a pause (pthrDelay = 0): on few cores it takes one from each engine."
            ]
        return [
            "NIXL's Python file is patched (pthrDelay): without that its progress thread takes a whole core of each engine."
        ]
    return []


@contextlib.contextmanager
def service(size: int, port: int, http_port: int, log: Path) -> Iterator[None]:
    """LMCache's server while the arm runs."""
    script = [sys.executable, "-c", "from lmcache.cli.main import main; import sys; sys.exit(main())"]
    folder = lmcache_folder()
    assert folder is not None
    if (folder / "bin" / "lmcache").exists():
        script = [sys.executable, str(folder / "bin" / "lmcache")]
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--http-port", str(http_port), "--chunk-size", "256"]
    words += ["--l1-size-gb", f"{size / 2**30:g}", "--eviction-policy", "LRU"]
    words += ["--supported-transfer-mode", "engine_driven", "--shm-name", f"pdbench{os.getpid()}", "--disable-metrics"]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*script, *words],
            env={**os.environ, **environment("lmcache")},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        _wait(process, f"http://127.0.0.1:{http_port}", log)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_SECONDS)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until its HTTP port answers anything at all."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-1000:]
            raise StartError(f"LMCache's server did not come up: {tail}")
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(url, timeout=2, trust_env=False)
            return
        time.sleep(0.3)

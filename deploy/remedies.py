"""What to do about a process that died: its last words, or the signal that ended it, to a sentence. Pure.

Engines say what went wrong in many ways and seldom what to change in a topology; these are the ones users meet.
"""

from __future__ import annotations

import re

_TOO_LITTLE_MEMORY = (
    "It does not fit into memory: lower engine.max_model_len or max_num_seqs, give it less KV cache (kv_cache_space_gib on the CPU, "
    "gpu_memory_utilization on a GPU), or a smaller model; pdserve doctor says how much there is."
)
# The first that matches the cause, else the end of the log. Specific ones come first.
_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"KV cache is needed, which is larger than the available",
        "Its KV cache does not hold one request of full length: lower engine.max_model_len, or raise kv_cache_space_gib (CPU) or "
        "gpu_memory_utilization (GPU).",
    ),
    (
        r"[Ff]ree memory on device .* less than desired|No available memory for the cache blocks",
        "Somebody else uses that GPU, or the share is too large: nvidia-smi shows who; lower engine.gpu_memory_utilization.",
    ),
    (r"[Oo]ut of memory|OutOfMemory|can't allocate memory|[Cc]annot allocate memory|MemoryError", _TOO_LITTLE_MEMORY),
    (
        r"[Aa]vailable (node )?memory .* less than (desired|requested)|Invalid KV cache space|exceeds? .*(available|total) memory",
        _TOO_LITTLE_MEMORY,
    ),
    (r"outside the supported range", "Install a vLLM in that range; pdserve doctor says which is there."),
    (
        r"No CUDA GPUs are available|Failed to infer device type|libcuda|NVML|no NVIDIA driver",
        "The GPU cannot be used: pdserve doctor says what the driver lacks; engine.device: cpu runs without one.",
    ),
    (
        r"Repo id must|not a valid model identifier|LocalEntryNotFound|couldn't connect to|OfflineModeIsEnabled|no file named",
        "The model's files cannot be had: correct `model`, or fetch it to a folder and name that.",
    ),
    (
        r"trust_remote_code|remote code",
        'The model brings code of its own: if you trust it, engine.extra_args: ["--trust-remote-code"].',
    ),
    (
        r"unrecognized arguments|invalid choice|expected one argument",
        "The engine does not know a flag: correct engine.extra_args.",
    ),
    (r"[Aa]ddress already in use", "Its port is taken: stop that program, or give the engine another port."),
    (r"No space left on device", "A disk or /dev/shm is full: pdserve doctor says which."),
)
_KILLED = "was killed by SIGKILL"
_KILLED_FIX = f"Most likely by the kernel, for want of memory (see dmesg). {_TOO_LITTLE_MEMORY}"


def remedy(problem: str, cause: str, lines: list[str]) -> str:
    """A sentence, or "" where nothing is known. `problem`: how it ended; `cause`: its last error; `lines`: the log's end."""
    for text in (cause, "\n".join(lines)):
        for pattern, fix in _REMEDIES:
            if re.search(pattern, text):
                return fix
    return _KILLED_FIX if _KILLED in problem else ""

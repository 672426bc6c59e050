"""Last words of engines, as they were seen, and what the user is told to do."""

from __future__ import annotations

import pytest

from pdserve.deploy.remedies import remedy

SEEN = [
    ("ValueError: To serve at least one request with the model's max seq len (32768), (4.5 GiB KV cache is needed, which is larger "
     "than the available KV cache memory (1.2 GiB)).", "lower engine.max_model_len, or raise kv_cache_space_gib"),
    ("ValueError: Free memory on device cuda:0 (3.1/79.2 GiB) on startup is less than desired GPU memory utilization (0.9).",
     "nvidia-smi shows who"),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "It does not fit into memory"),
    ("RuntimeError: [enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.",
     "It does not fit into memory"),
    ("RuntimeError: Worker failed with error 'Available memory on node 0 (16.57/21.09 GiB) on kv cache allocation is less than "
     "requested memory for kv (4000.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used.'",
     "It does not fit into memory"),
    ("pdserve.errors.UnsupportedError: vLLM 0.25.1 is outside the supported range >=0.26,<0.33", "Install a vLLM in that range"),
    ("RuntimeError: Failed to infer device type", "pdserve doctor says what the driver lacks"),
    ("OSError: ./m is not a local folder and is not a valid model identifier listed on the hub", "correct `model`"),
    ("vllm: error: unrecognized arguments: --no-such-flag", "correct engine.extra_args"),
    ("OSError: [Errno 98] Address already in use", "Its port is taken"),
    ("OSError: [Errno 28] No space left on device", "pdserve doctor says which"),
]  # fmt: skip


@pytest.mark.parametrize(("cause", "fix"), SEEN, ids=[cause[:30] for cause, _ in SEEN])
def test_known_words_have_a_fix(cause: str, fix: str) -> None:
    assert fix in remedy("exited with code 1", cause, [])
    assert fix in remedy("exited with code 1", "", ["something", cause])


def test_a_kill_is_most_likely_for_want_of_memory() -> None:
    assert "dmesg" in remedy("was killed by SIGKILL", "", [])
    assert remedy("exited with code 1", "KeyError: 'x'", ["KeyError: 'x'"]) == ""

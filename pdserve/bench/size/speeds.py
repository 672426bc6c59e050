"""How fast an engine computes a prompt, loads KV and writes tokens: measured on a deployment that runs, kept in a small JSON file."""

from __future__ import annotations

import random
import re
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from pdserve.bench import quick
from pdserve.bench.size.work import WHOLE
from pdserve.errors import ConfigError, UpstreamError
from pdserve.openai_client import Client
from pdserve.target import Target

LENGTHS = (0.2, 0.5, 0.9)  # of the longest prompt that is taken
REPEATS = 3
OUTPUT = 32
MOST_TOKENS = 32000
SPARE = 64


class Tier(msgspec.Struct, kw_only=True):
    """seconds = base + tokens x KV bytes / bytes_per_second."""

    base: float = 0.0
    bytes_per_second: float


class Speeds(msgspec.Struct, kw_only=True):
    """Computing tokens [h, n) takes base + linear (n - h) + square (n² - h²) seconds. `source` says where they are from."""

    source: str
    base: float
    linear: float
    square: float = 0.0
    token: float  # seconds between two tokens of an answer
    tiers: dict[str, Tier] = {}
    gpu_tokens: int = 0  # KV that one instance's own prefix cache holds

    def compute(self, known: int, tokens: int) -> float:
        if tokens <= known:
            return 0.0
        return self.linear * (tokens - known) + self.square * (tokens**2 - known**2)

    def load(self, tier: str, tokens: int, kv_bytes: int) -> float:
        found = self.tiers[tier]
        return found.base + tokens * kv_bytes / found.bytes_per_second if tokens else 0.0


#: one H200 with Qwen3-8B in bf16: cold 2k, 10k, 20k, 30k tokens in 60, 313, 695 and 1203 ms, loads at 0.98 of the bus, 5.7 ms
#: between tokens (docs/measurements.md); its own cache is what 0.9 of its memory leaves beside the weights
H200_8B = Speeds(
    source="H200, Qwen3-8B, bf16 (docs/measurements.md)", base=0.0123, linear=2.41e-5, square=5.16e-10, token=0.0057,
    tiers={"dram": Tier(bytes_per_second=54e9)}, gpu_tokens=700_000,
)  # fmt: skip
KNOWN = {"h200-8b": H200_8B}


def read(name: str) -> Speeds:
    if name in KNOWN:
        return KNOWN[name]
    try:
        return msgspec.json.decode(Path(name).read_bytes(), type=Speeds)
    except OSError as error:
        fix = f"Measure them: pdserve size --measure URL --save speeds.json; or use {', '.join(KNOWN)}."
        raise ConfigError("--speeds", f"{name} cannot be read: {error}", fix) from error
    except msgspec.DecodeError as error:
        raise ConfigError("--speeds", f"{name} holds no speeds: {error}") from error


def fit(points: list[tuple[int, float]], most_base: float = float("inf")) -> tuple[float, float, float]:
    """(base, linear, square), none negative, from (tokens, seconds): a parabola only where a line is not enough. `most_base`: what
    the base cannot be more than; three points far from zero say little about it."""
    base, linear, square = _fit(points, ((0, 1, 2), (0, 1), (1, 2), (1,)))
    if base <= most_base:
        return base, linear, square
    return most_base, *_fit([(n, max(0.0, t - most_base)) for n, t in points], ((1, 2), (1,)))[1:]


def _fit(points: list[tuple[int, float]], shapes: tuple[tuple[int, ...], ...]) -> tuple[float, float, float]:
    lengths = np.array([p[0] for p in points], dtype=float)
    seconds = np.array([p[1] for p in points], dtype=float)
    for columns in shapes:
        matrix = np.stack([lengths**c for c in columns], axis=1)
        if len(set(lengths)) < len(columns):
            continue
        found, *_ = np.linalg.lstsq(matrix / matrix.max(axis=0), seconds, rcond=None)
        found = found / matrix.max(axis=0)
        if (found >= 0).all():
            by_power = dict(zip(columns, found.tolist(), strict=True))
            return by_power.get(0, 0.0), by_power.get(1, 0.0), by_power.get(2, 0.0)
    return 0.0, float(seconds.sum() / lengths.sum()), 0.0


def measure(target: Target, kv_bytes: int, seed: int = 0) -> Speeds:
    """Cold and loaded first tokens at three lengths, medians of three. Loads only where engines can empty their own caches."""
    rng = random.Random(seed)
    with Client(target.url) as client:
        longest = min(client.max_model_len() - SPARE, MOST_TOKENS)
        cold, warm, gaps = [], [], []
        for share in LENGTHS:
            length = int(longest * share)
            pairs = [_pair(client, target, rng.randrange(10**9), length) for _ in range(REPEATS)]
            cold.append((length, median(p[0] for p in pairs)))
            gaps += [p[1] for p in pairs]
            if all(p[2] is not None for p in pairs):
                warm.append((length, median(p[2] for p in pairs if p[2] is not None)))
    # a loaded prompt costs the base, too: whatever the cold ones' curve says at zero tokens, it is not more than that
    base, linear, square = fit(cold, min((t for _, t in warm), default=float("inf")))
    tiers = {}
    if warm and target.has_cache:
        # what is behind the last whole chunk is computed
        loads = [(n, max(1e-6, t - base - linear * (n % WHOLE))) for n, t in warm]
        load_base, per_token, _ = fit(loads) if len(loads) > 1 else (0.0, loads[0][1] / loads[0][0], 0.0)
        tiers["dram"] = Tier(base=load_base, bytes_per_second=kv_bytes / max(per_token, 1e-12))
    source = (
        f"measured: {len(LENGTHS)} lengths up to {int(longest * LENGTHS[-1])} tokens, medians of {REPEATS}, seed {seed}"
    )
    return Speeds(
        source=source,
        base=base,
        linear=linear,
        square=square,
        token=median(gaps),
        tiers=tiers,
        gpu_tokens=gpu_tokens(target),
    )


def _pair(client: Client, target: Target, seed: int, length: int) -> tuple[float, float, float | None]:
    """(cold TTFT, seconds per token, TTFT of the same prompt loaded)."""
    (prompt,) = quick.fresh_prompts(client, 1, length, seed)
    answer = client.complete(prompt, max_tokens=OUTPUT, ignore_eos=True)
    if not (target.has_cache and quick.settle(target)):
        return answer.ttft, answer.tpot, None
    return answer.ttft, answer.tpot, quick.ttft(client, prompt)[0]


def gpu_tokens(target: Target) -> int:
    """What vLLM says its cache holds; 0 where it cannot be asked."""
    for url in (u for role in ("prefill", "both", "decode") for u in target.engines.get(role, ())):
        try:
            with Client(url) as engine:
                text = engine.get("/metrics", timeout=10).text
        except UpstreamError:
            continue
        info = re.search(r"vllm:cache_config_info\{([^}]*)\}", text)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', info[1])) if info else {}
        if labels.get("num_gpu_blocks", "").isdigit() and labels.get("block_size", "").isdigit():
            return int(labels["num_gpu_blocks"]) * int(labels["block_size"])
    return 0

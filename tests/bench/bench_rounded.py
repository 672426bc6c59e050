"""What the rounded payloads lose: python -P tests/bench/bench_rounded.py [--tokens N] [--json FILE]   (demo model, no engine; 2 minutes)

KV of a text is computed by the demo model in float32 and rounded: the relative error of K and of V (root of the mean square), for
several ways to scale, and what becomes of the answer: the next tokens' log-probabilities on the text itself, and how often the
most likely token is another one. The first two ways are what pdserve can store; the others say what they were chosen over.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from pdserve import model
from pdserve.kernels import torch_path

TEXT = Path("/usr/share/common-licenses/GPL-3")
Way = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # K, V [batch, head, token, size] -> rounded


def ours(payload: str) -> Way:
    def both(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.cat((k, v), dim=-1).contiguous().view(torch.uint8)
        back = torch_path.grow(torch_path.shrink(rows, payload, "float32"), payload, "float32").view(torch.float32)
        return back[..., : k.shape[-1]], back[..., k.shape[-1] :]

    return both


def scaled(dims: tuple[int, ...], to: str) -> Way:
    """One scale, any number, for all values along `dims`; none for no dims."""

    def one(x: torch.Tensor) -> torch.Tensor:
        largest = x.abs().amax(dims, keepdim=True) if dims else torch.ones(1)
        if to == "int8":
            step = largest / 127
            return (x / step).round().clamp(-127, 127) * step
        scale = largest / 448 if dims else torch.ones(1)
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    return lambda k, v: (one(k), one(v))


WAYS: dict[str, Way] = {
    "int8, eight powers of two a token and head (pdserve)": ours("int8"),
    "fp8, eight powers of two a token and head (pdserve)": ours("fp8"),
    "fp8, no scale (vLLM's kv_cache_dtype fp8)": scaled((), "fp8"),
    "fp8, a scale for each layer and head": scaled((2, 3), "fp8"),
    "fp8, a scale for each token and head": scaled((3,), "fp8"),
    "int8, a scale for each token and head": scaled((3,), "int8"),
    "int8, a scale for each layer and head": scaled((2, 3), "int8"),
}


def cache_of(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for layer, (k, v) in enumerate(pairs):
        cache.update(k.clone(), v.clone(), layer)
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1500, help="of the text that is rounded (default %(default)s)")
    parser.add_argument("--follow", type=int, default=256, help="tokens behind it whose probabilities count (default %(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = model.resolve("demo").source
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[:, : args.tokens + args.follow]
    head, tail = ids[:, : args.tokens], ids[:, args.tokens :]
    rows = []
    with torch.inference_mode():
        cache = lm(head, use_cache=True).past_key_values
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        exact = lm(tail, past_key_values=cache_of(pairs)).logits.log_softmax(-1)[0, :-1]
        own = exact.gather(1, tail[0, 1:, None])
        for name, way in WAYS.items():
            rounded = [way(k, v) for k, v in pairs]
            errors = [[((a - b).norm() / a.norm()).item() for a, b in zip(x, y, strict=True)] for x, y in zip(pairs, rounded, strict=True)]
            got = lm(tail, past_key_values=cache_of(rounded)).logits.log_softmax(-1)[0, :-1]
            shift = (got.gather(1, tail[0, 1:, None]) - own).abs().squeeze(1)
            row = {
                "way": name,
                "K": statistics.mean(e[0] for e in errors),
                "V": statistics.mean(e[1] for e in errors),
                "worst layer": max(max(e) for e in errors),
                "logprob shift mean": shift.mean().item(),
                "p99": shift.quantile(0.99).item(),
                "max": shift.max().item(),
                "same best token": (got.argmax(-1) == exact.argmax(-1)).float().mean().item(),
                "KL": (exact.exp() * (exact - got)).sum(-1).mean().item(),
            }
            rows.append(row)
            figures = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if k != "way")
            print(f"{name:54} {figures}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"tokens": args.tokens, "follow": args.follow, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

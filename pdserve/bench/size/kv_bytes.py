"""Bytes of KV per token, from a model's config.json. Pure."""

from __future__ import annotations

from typing import Any

from pdserve.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
_NO_KV = ("linear_attention", "mamba", "recurrent", "conv")


def per_token(config: dict[str, Any], dtype: str = "auto") -> int:
    """Of all layers and heads together, whatever the tensor parallel size (it deals them out)."""
    text = config.get("text_config") or config
    name = (
        dtype
        if dtype != "auto"
        else str(text.get("torch_dtype") or text.get("dtype") or "bfloat16").removeprefix("torch.")
    )
    if name not in DTYPE_BYTES:
        raise ConfigError("--kv-dtype", f"{name!r} is not known", f"Known: {', '.join(DTYPE_BYTES)}.")
    try:
        layers = _attention_layers(text)
        if text.get("kv_lora_rank"):  # one compressed vector instead of keys and values
            return int(layers * (text["kv_lora_rank"] + text["qk_rope_head_dim"]) * DTYPE_BYTES[name])
        heads = text.get("num_key_value_heads") or text["num_attention_heads"]
        width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    except (KeyError, TypeError) as error:
        problem = f"the model's config.json lacks {error}"
        raise ConfigError("--model", problem, "Give --kv-bytes-per-token.") from error
    return int(2 * layers * heads * width * DTYPE_BYTES[name])


def _attention_layers(text: dict[str, Any]) -> int:
    """Layers with keys and values; of a hybrid model those that are not recurrent."""
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and kinds:
        return sum(kind not in _NO_KV for kind in kinds)
    return int(text["num_hidden_layers"])

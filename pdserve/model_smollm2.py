"""SmolLM2-135M-Instruct from a GGUF file (4 bit) to the folder that vLLM loads (bf16 safetensors, tokenizer, configs).

The weights are Apache-2.0. Neither torch nor transformers is needed: numpy does the arithmetic, and a safetensors file
is a length, a JSON header and raw bytes. Three things that a naive conversion gets wrong are handled here:

* llama.cpp stores the rows of q and k interleaved; vLLM wants the two halves of a rotary pair apart (`_half_rotate`).
* The tokenizer must split digits before the byte-level step, else "12" gets other ids than the real tokenizer gives.
* The upstream chat template adds a system message that this 4-bit copy answers worse with; ours adds none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CONTROL_TOKEN = 3  # GGUF's token type for <|im_start|> and the like


def convert(gguf_file: Path, out: Path, kv_heads: int = 0) -> None:
    """Writes the model folder. `kv_heads` above the model's 3 adds zero heads: same outputs, but it can be split."""
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf_file))

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    out.mkdir(parents=True, exist_ok=True)
    added = max(kv_heads - value("llama.attention.head_count_kv"), 0)
    _write_safetensors(out / "model.safetensors", _tensors(reader, value, added))
    _write_json(out / "config.json", _config(value, added))
    _write_json(out / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2})
    _write_tokenizer(value, out)


def _tensors(reader: Any, value: Callable[[str], Any], added: int) -> dict[str, np.ndarray]:
    from gguf.quants import dequantize

    stored = {tensor.name: tensor for tensor in reader.tensors}
    heads, kv = value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    head_dim = value("llama.embedding_length") // heads
    extra_q, extra_kv = added * (heads // kv) * head_dim, added * head_dim

    def load(name: str) -> np.ndarray:
        tensor = stored[name]
        flat = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        return flat.reshape([int(n) for n in tensor.shape][::-1])

    def pad(w: np.ndarray, rows: int = 0, cols: int = 0) -> np.ndarray:
        return np.pad(w, ((0, rows), (0, cols)))

    made = {"model.embed_tokens.weight": load("token_embd.weight"), "model.norm.weight": load("output_norm.weight")}
    same = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(value("llama.block_count")):
        old, new = f"blk.{layer}.", f"model.layers.{layer}."
        for ours, theirs in same.items():
            made[f"{new}{theirs}.weight"] = load(f"{old}{ours}.weight")
        attention = f"{new}self_attn."
        made[f"{attention}q_proj.weight"] = pad(_half_rotate(load(f"{old}attn_q.weight"), heads), rows=extra_q)
        made[f"{attention}k_proj.weight"] = pad(_half_rotate(load(f"{old}attn_k.weight"), kv), rows=extra_kv)
        made[f"{attention}v_proj.weight"] = pad(load(f"{old}attn_v.weight"), rows=extra_kv)
        made[f"{attention}o_proj.weight"] = pad(load(f"{old}attn_output.weight"), cols=extra_q)
    return made


def _half_rotate(w: np.ndarray, heads: int) -> np.ndarray:
    half = w.shape[0] // heads // 2
    return w.reshape(heads, half, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def _config(value: Callable[[str], Any], added: int) -> dict[str, Any]:
    heads, kv = value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    width, theta = value("llama.embedding_length"), value("llama.rope.freq_base")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": value("llama.feed_forward_length"),
        "head_dim": width // heads,
        "num_attention_heads": heads + added * (heads // kv),
        "num_key_value_heads": kv + added,
        "num_hidden_layers": value("llama.block_count"),
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.041666666666666664,
        # transformers 4 reads the first spelling, 5 the second.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": value("llama.vocab_size"),
    }


def _write_tokenizer(value: Callable[[str], Any], out: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        AddedToken(t, special=True, normalized=False)
        for t, kind in zip(tokens, kinds, strict=True)
        if kind == _CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": value("llama.context_length"),
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(out / "tokenizer_config.json", settings)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _to_bf16(w: np.ndarray) -> np.ndarray:
    """Rounds to nearest even, as torch does; numpy has no bf16, so the result is its bits."""
    bits = np.ascontiguousarray(w, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, w in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(w.shape), "data_offsets": [position, position + w.size * 2]}
        position += w.size * 2
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for w in tensors.values():
            file.write(_to_bf16(w).tobytes())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")

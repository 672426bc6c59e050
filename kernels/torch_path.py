"""Gather, scatter and digest of paged KV in plain torch: what serves where no GPU compiler is, and the kernels' oracle.

Works on any device torch knows. A layer is a uint8 view [block, token, head, part, bytes]: one part that holds K and V, or
one for each; nothing here depends on how it lies in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import rounded

_STEP, _MUL_A, _MUL_B = (
    x - (1 << 64) if x >> 63 else x for x in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F)
)
_SLICE_WORDS = 1 << 22


def _mix(x: torch.Tensor) -> torch.Tensor:
    # torch shifts int64 arithmetically: the bits that came in from the sign are masked away.
    x = x ^ ((x >> 32) & 0xFFFFFFFF)
    x = x * _MUL_A
    x = x ^ ((x >> 29) & 0x7FFFFFFFF)
    x = x * _MUL_B
    return x ^ ((x >> 32) & 0xFFFFFFFF)


def digest(data: torch.Tensor) -> int:
    """The digest of csrc/digest.h over a contiguous uint8 tensor whose length is a multiple of 8."""
    words = data.reshape(-1).view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, words.numel(), _SLICE_WORDS):
        part = words[start : start + _SLICE_WORDS]
        position = torch.arange(start + 1, start + 1 + part.numel(), dtype=torch.int64, device=data.device)
        total += _mix(part + position * _STEP).sum()
    length = torch.tensor(data.numel(), dtype=torch.int64, device=data.device)
    return int(_mix(total ^ (length * _STEP))) & 0xFFFFFFFFFFFFFFFF


def gather(layers: Sequence[torch.Tensor], blocks: Sequence[int], tokens: int) -> torch.Tensor:
    """The chunk [head, layer, token, bytes] of the first `tokens` tokens of the blocks, contiguous."""
    ids = torch.tensor(list(blocks), dtype=torch.int64, device=layers[0].device)
    rows = [p[ids].flatten(0, 1)[:tokens].flatten(2) for p in layers]  # each [token, head, bytes of K then V]
    return torch.stack(rows).permute(2, 0, 1, 3).contiguous()


def scatter(chunk: torch.Tensor, layers: Sequence[torch.Tensor], blocks: Sequence[int | None]) -> None:
    """The way back; None leaves that block alone, and tokens after the chunk's end are not touched."""
    tokens, size = chunk.shape[2], layers[0].shape[1]
    at = torch.arange(tokens, device=chunk.device)
    ids = torch.tensor([-1 if b is None else b for b in blocks], dtype=torch.int64, device=chunk.device)
    block = ids[at // size]
    keep = block >= 0
    for i, pages in enumerate(layers):
        rows = chunk[:, i].transpose(0, 1)[keep]  # [token, head, bytes]
        pages[block[keep], (at % size)[keep]] = rows.unflatten(2, tuple(pages.shape[3:]))


def shrink(chunk: torch.Tensor, payload: str, dtype: str) -> torch.Tensor:
    """A chunk [.., bytes of a token] in the cache's format -> [.., stored row], a payload of csrc/rounded.h."""
    x = chunk.contiguous().view(getattr(torch, dtype)).float()
    grouped = x.unflatten(-1, (rounded.groups(x.shape[-1]), -1)).contiguous()
    bits = grouped.view(torch.int32) & 0x7FFFFFFF
    finite = bits < 0x7F800000
    carry, shift = (0x1FFFFF, 8) if payload == rounded.FP8 else (0x1FFFF, 6)
    scale = (((torch.where(finite, bits, 0).amax(-1) + carry) >> 23) - shift).clamp(min=10)
    scaled = torch.where(finite, grouped, 0) * ((254 - scale) << 23).view(torch.float32).unsqueeze(-1)
    if payload == rounded.FP8:
        codes = torch.where(finite, scaled.to(torch.float8_e4m3fn).view(torch.uint8), 0x7F)
    else:
        codes = torch.where(finite, scaled.round().clamp(-127, 127), -128).to(torch.int8).view(torch.uint8)
    scales = torch.zeros(*x.shape[:-1], 8, dtype=torch.uint8, device=x.device)
    scales[..., : scale.shape[-1]] = scale.to(torch.uint8)
    return torch.cat((scales, codes.flatten(-2)), dim=-1)


def grow(stored: torch.Tensor, payload: str, dtype: str) -> torch.Tensor:
    """The way back."""
    count = rounded.groups(stored.shape[-1] - 8)
    up = (stored[..., :count].to(torch.int32) << 23).view(torch.float32)
    codes = stored[..., 8:].contiguous()
    if payload == rounded.FP8:
        values, is_nan = codes.view(torch.float8_e4m3fn).float(), (codes & 0x7F) == 0x7F
    else:
        values, is_nan = codes.view(torch.int8).float(), codes == 0x80
    x = (values.unflatten(-1, (count, -1)) * up.unsqueeze(-1)).flatten(-2)
    if dtype == "float16":
        x = x.clamp(-65504, 65504)
    bits = x.to(getattr(torch, dtype)).view(torch.int32 if dtype == "float32" else torch.int16)
    return torch.where(is_nan, rounded.NAN[dtype], bits).view(torch.uint8)

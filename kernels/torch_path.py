"""Gather, scatter and digest of paged KV in plain torch: what serves where no GPU compiler is, and the kernels' oracle.

Works on any device torch knows. A layer is a uint8 view [block, token, head, part, bytes]: one part that holds K and V, or
one for each; nothing here depends on how it lies in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

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

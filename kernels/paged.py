"""How an engine's paged KV cache lies in memory, in numbers: what the GPU kernels and the plain torch path are told.

The canonical chunk that they make and read is [head][layer][token][K then V]: independent of block size, of the order of
heads and tokens inside a block, and of how many workers the heads are spread over.
"""

from __future__ import annotations

from dataclasses import dataclass

#: of a shard's start: chunks may be read and written 16 bytes at a time
ALIGN = 16


@dataclass(frozen=True)
class Geometry:
    """Strides in bytes, the same in all layers. One token of one head is `parts` runs of `part_bytes` (K and V, or one run)."""

    bases: tuple[int, ...]  # address of block 0, head 0, token 0 of each layer
    block_stride: int
    head_stride: int
    token_stride: int
    part_stride: int
    heads: int
    parts: int
    part_bytes: int
    block_tokens: int
    num_blocks: int

    @property
    def layers(self) -> int:
        return len(self.bases)

    @property
    def token_bytes(self) -> int:
        """K and V of one token, one head, one layer."""
        return self.parts * self.part_bytes

    def shard_bytes(self, tokens: int) -> int:
        return self.layers * tokens * self.token_bytes

    @property
    def wide(self) -> bool:
        """Whether 16 bytes at a time is possible."""
        strides = (self.block_stride, self.head_stride, self.token_stride, self.part_stride, self.part_bytes)
        return all(x % 16 == 0 for x in (*self.bases, *strides))

    def check(self) -> None:
        """Raises ValueError when the kernels cannot serve it."""
        strides = (self.block_stride, self.head_stride, self.token_stride, self.part_stride, self.part_bytes)
        if any(x % 8 for x in (*self.bases, *strides)):
            raise ValueError(f"addresses or strides are not multiples of 8 bytes: {strides}")
        if min(self.heads, self.parts, self.part_bytes, self.block_tokens, self.num_blocks, self.layers) < 1:
            raise ValueError(f"an empty KV cache: {self}")

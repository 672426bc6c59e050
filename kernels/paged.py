"""How an engine's paged KV cache lies in memory, in numbers: what the GPU kernels and the plain torch path are told.

The canonical chunk that they make and read is [head][layer][token][K then V]: independent of block size, of the order of
heads and tokens inside a block, and of how many workers the heads are spread over.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import rounded

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
    #: a rounded payload (csrc/rounded.h) and the type of the values; "": chunks carry the bytes as they are
    payload: str = ""
    dtype: str = ""

    @property
    def layers(self) -> int:
        return len(self.bases)

    @property
    def token_bytes(self) -> int:
        """K and V of one token, one head, one layer."""
        return self.parts * self.part_bytes

    @property
    def stored_token_bytes(self) -> int:
        """The same in a chunk."""
        return rounded.row_bytes(self.token_bytes // rounded.value_bytes(self.dtype)) if self.payload else self.token_bytes

    def shard_bytes(self, tokens: int) -> int:
        return self.layers * tokens * self.stored_token_bytes

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
        if self.payload:
            size = rounded.value_bytes(self.dtype)
            rounded.groups(self.token_bytes // size)
            if self.part_bytes % (8 * size):
                raise ValueError(f"K or V of {self.part_bytes} bytes a token is not a multiple of 8 values of type {self.dtype}")

"""Engine blocks <-> arena, through the kernels. Here for engines whose KV cache is in host memory.

A worker's KV cache is `layers` tensors of equally large blocks; a shard of a chunk is [layer][block], blocks whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pdserve import kernels


class HostPages:
    """Where one worker's KV blocks are. The caller keeps the memory alive as long as this is used.

    bases: address of block 0 of each layer; strides: bytes from one block to the next, by layer; block_bytes: bytes of
    one block of one layer, contiguous.
    """

    def __init__(self, bases: Sequence[int], strides: Sequence[int], block_bytes: int, num_blocks: int) -> None:
        if block_bytes % 8:
            raise ValueError(f"a block of {block_bytes} bytes is not a multiple of 8")
        self.block_bytes, self.num_blocks, self.layers = block_bytes, num_blocks, len(bases)
        self._bases = np.asarray(bases, dtype=np.uint64)[:, None]
        self._strides = np.asarray(strides, dtype=np.uint64)[:, None]

    def shard_bytes(self, blocks: int) -> int:
        return self.layers * blocks * self.block_bytes

    def gather(self, block_ids: Sequence[int], to: np.ndarray) -> int:
        """Copies the blocks into `to` (uint8, shard_bytes long); returns the digest."""
        return kernels.gather(self._addresses(block_ids), self.block_bytes, to)

    def scatter(self, source: np.ndarray, block_ids: Sequence[int | None]) -> int:
        """Copies a shard into the blocks; None leaves that block alone. Returns the digest of all of `source`."""
        wanted = np.array([b is not None for b in block_ids])
        addresses = self._addresses([b or 0 for b in block_ids]).reshape(self.layers, len(block_ids))
        addresses[:, ~wanted] = 0
        return kernels.scatter(source, np.ascontiguousarray(addresses.reshape(-1)), self.block_bytes)

    def _addresses(self, block_ids: Sequence[int]) -> np.ndarray:
        ids = np.asarray(block_ids, dtype=np.uint64)
        if ids.size and int(ids.max()) >= self.num_blocks:
            raise ValueError(f"block {int(ids.max())} of {self.num_blocks}")
        return np.ascontiguousarray((self._bases + ids[None, :] * self._strides).reshape(-1))

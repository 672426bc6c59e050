"""Engine blocks <-> arena where both are in host memory: one copy, which has ended when the call returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pdserve import kernels
from pdserve.kernels import rounded
from pdserve.transfer.arena import Arena
from pdserve.transfer.staging import Copy, Done, OneByOne


class HostPages(OneByOne):
    """KV in host memory, of which only whole blocks of a head are moved: a shard is [layer][block]. The caller keeps the memory
    alive.

    bases: for each head here, the address of its part of block 0 in each layer; strides: bytes from one block to the next, by
    layer; block_bytes: bytes of one block of one head of one layer, contiguous. rounding: (payload, type of the values, how many
    make a row); None stores the blocks as they are.
    """

    on_device = False

    def __init__(
        self,
        bases: Sequence[Sequence[int]],
        strides: Sequence[int],
        block_bytes: int,
        num_blocks: int,
        *,
        first_shard: int = 0,
        stores: bool = True,
        rounding: tuple[str, str, int] | None = None,
    ) -> None:
        if block_bytes % 8:
            raise ValueError(f"a block of {block_bytes} bytes is not a multiple of 8")
        self.block_bytes, self.num_blocks, self.layers = block_bytes, num_blocks, len(strides)
        self.first_shard, self.shard_count, self.stores = first_shard, len(bases), stores
        self._rounding, self._stored_bytes, self._rows = rounding, block_bytes, 0
        if rounding is not None:
            _, dtype, values = rounding
            self._rows, rest = divmod(block_bytes, values * rounded.value_bytes(dtype))
            if rest:
                raise ValueError(f"a block of {block_bytes} bytes is not whole rows of {values} values of type {dtype}")
            rounded.groups(values)
            self._stored_bytes = self._rows * rounded.row_bytes(values)
        self._bases = np.asarray(bases, dtype=np.uint64)[:, :, None]
        self._strides = np.asarray(strides, dtype=np.uint64)[:, None]

    def describe(self) -> str:
        kind, why = kernels.path()
        blocks = f"{self.num_blocks} blocks of {self.shard_count} x {self.block_bytes} bytes"
        stored = f", stored as {self._rounding[0]}" if self._rounding else ""
        return f"{kind}{f' ({why})' if why else ''}; {self.layers} layers, {blocks}{stored}"

    def shard_bytes(self, tokens: int, blocks: int) -> int:
        return self.layers * blocks * self._stored_bytes

    def attach(self, arena: Arena, chunk_tokens: int) -> None:
        pass

    def mark(self) -> None:
        return None

    def store(self, mark: Any, block_ids: Sequence[int], tokens: int, to: np.ndarray, stride: int) -> Copy:
        size = self.shard_bytes(tokens, len(block_ids))
        addresses = self._addresses(block_ids)
        return Done([self._gather(a, to[at : at + size]) for a, at in self._each(addresses, stride)])

    def load(self, mark: Any, source: np.ndarray, block_ids: Sequence[int | None], tokens: int, stride: int) -> Copy:
        size = self.shard_bytes(tokens, len(block_ids))
        addresses = self._addresses([b or 0 for b in block_ids])
        addresses[:, :, [b is None for b in block_ids]] = 0
        return Done([self._scatter(source[at : at + size], a) for a, at in self._each(addresses, stride)])

    def settle(self) -> None:
        pass  # a store has ended when store() returns

    def close(self) -> None:
        pass

    def _gather(self, addresses: np.ndarray, to: np.ndarray) -> int:
        if self._rounding is None:
            return kernels.gather(addresses, self.block_bytes, to)
        payload, dtype, values = self._rounding
        return kernels.gather_rounded(addresses, self._rows, values, payload, dtype, to)

    def _scatter(self, source: np.ndarray, addresses: np.ndarray) -> int:
        if self._rounding is None:
            return kernels.scatter(source, addresses, self.block_bytes)
        payload, dtype, values = self._rounding
        return kernels.scatter_rounded(source, addresses, self._rows, values, payload, dtype)

    def _addresses(self, block_ids: Sequence[int]) -> np.ndarray:
        """[head][layer][block]"""
        ids = np.asarray(block_ids, dtype=np.uint64)
        if ids.size and int(ids.max()) >= self.num_blocks:
            raise ValueError(f"block {int(ids.max())} of {self.num_blocks}")
        return self._bases + ids[None, None, :] * self._strides

    @staticmethod
    def _each(addresses: np.ndarray, stride: int) -> Iterator[tuple[np.ndarray, int]]:
        """Each head's addresses, and where its shard begins."""
        for head, rows in enumerate(addresses):
            yield np.ascontiguousarray(rows.reshape(-1)), head * stride

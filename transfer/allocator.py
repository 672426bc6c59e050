"""Where in the arena a chunk goes: first fit over free extents, from both ends. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

PAGE = 4096


def align(size: int) -> int:
    return -(-size // PAGE) * PAGE


class Allocator:
    """Hands out page-aligned extents of [0, capacity).

    Full chunks are taken from the low end, small ones (tails) from the high end: mixed, the tails would leave holes
    that no full chunk fits into.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // PAGE * PAGE
        self.used = 0
        # Free extents by address: two lists that move together.
        self._starts: list[int] = [0] if self.capacity else []
        self._ends: list[int] = [self.capacity] if self.capacity else []
        self._taken: dict[int, int] = {}

    def allocate(self, size: int, *, high: bool = False) -> int | None:
        """Offset of `size` bytes (rounded up to pages), or None when no free extent is large enough."""
        size = align(size)
        if size <= 0:
            raise ValueError("size must be positive")
        order = range(len(self._starts) - 1, -1, -1) if high else range(len(self._starts))
        for i in order:
            start, end = self._starts[i], self._ends[i]
            if end - start < size:
                continue
            if high:
                offset = end - size
                self._ends[i] = offset
            else:
                offset = start
                self._starts[i] = start + size
            if self._starts[i] == self._ends[i]:
                del self._starts[i], self._ends[i]
            self._taken[offset] = size
            self.used += size
            return offset
        return None

    def claim(self, offset: int, size: int) -> bool:
        """Takes the extent at `offset` (page-aligned), as found in the journal of an earlier daemon. False: not free."""
        size = align(size)
        i = bisect_right(self._starts, offset) - 1
        if offset % PAGE or size <= 0 or i < 0 or offset + size > self._ends[i]:
            return False
        start, end = self._starts[i], self._ends[i]
        left, right = (start, offset), (offset + size, end)
        kept = [extent for extent in (left, right) if extent[0] < extent[1]]
        self._starts[i : i + 1] = [extent[0] for extent in kept]
        self._ends[i : i + 1] = [extent[1] for extent in kept]
        self._taken[offset] = size
        self.used += size
        return True

    def free(self, offset: int) -> None:
        """Gives an extent back and joins it with its free neighbours. Raises KeyError if it is not allocated."""
        size = self._taken.pop(offset)
        self.used -= size
        end = offset + size
        i = bisect_left(self._starts, offset)
        joins_before = i > 0 and self._ends[i - 1] == offset
        joins_after = i < len(self._starts) and self._starts[i] == end
        if joins_before and joins_after:
            self._ends[i - 1] = self._ends[i]
            del self._starts[i], self._ends[i]
        elif joins_before:
            self._ends[i - 1] = end
        elif joins_after:
            self._starts[i] = offset
        else:
            self._starts.insert(i, offset)
            self._ends.insert(i, end)

    def extents(self) -> list[tuple[int, int]]:
        """The free extents as (start, end), by address."""
        return list(zip(self._starts, self._ends, strict=True))

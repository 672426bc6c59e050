"""Which chunk goes next. Pure data structures; the store asks, and does the rest."""

from __future__ import annotations

import heapq
from typing import Protocol


class EvictionPolicy(Protocol):
    """Knows the chunks that can be evicted and in which order. Never names a chunk whose children are still there,
    because a prefix with a hole in it can no longer be hit, nor one that is pinned."""

    def add(self, key: bytes, parent: bytes) -> None:
        """A chunk became visible; counts as a use."""

    def touch(self, key: bytes) -> None:
        """A chunk was used."""

    def pin(self, key: bytes) -> None:
        """One more holder; a pinned chunk is not a victim."""

    def unpin(self, key: bytes) -> None:
        """One holder less."""

    def remove(self, key: bytes) -> None:
        """The chunk is gone."""

    def victim(self) -> bytes | None:
        """The chunk to evict next, or None when all that is left is pinned. Does not remove it."""


class _Node:
    __slots__ = ("parent", "pins", "used")

    def __init__(self, parent: bytes, used: int) -> None:
        self.parent, self.used, self.pins = parent, used, 0


class LeafFirstLru:
    """Least recently used among the chunks that no other chunk builds on.

    A use of a chunk is a use of its whole prefix, so a parent is never older than its children; time is a counter.
    The heap holds (used, key) and may be stale: an entry counts only while it equals the node's present state.
    """

    def __init__(self) -> None:
        self._nodes: dict[bytes, _Node] = {}
        self._children: dict[bytes, int] = {}
        self._heap: list[tuple[int, bytes]] = []
        self._clock = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def add(self, key: bytes, parent: bytes) -> None:
        self._clock += 1
        self._nodes[key] = _Node(parent, self._clock)
        if parent:
            self._children[parent] = self._children.get(parent, 0) + 1
        self._offer(key)

    def touch(self, key: bytes) -> None:
        self._clock += 1
        self._nodes[key].used = self._clock
        self._offer(key)

    def pin(self, key: bytes) -> None:
        self._nodes[key].pins += 1

    def unpin(self, key: bytes) -> None:
        node = self._nodes[key]
        node.pins -= 1
        if node.pins == 0:
            self._offer(key)

    def remove(self, key: bytes) -> None:
        node = self._nodes.pop(key)
        if node.parent:
            left = self._children[node.parent] - 1
            if left:
                self._children[node.parent] = left
            else:
                del self._children[node.parent]
                if node.parent in self._nodes:
                    self._offer(node.parent)

    def victim(self) -> bytes | None:
        while self._heap:
            used, key = self._heap[0]
            node = self._nodes.get(key)
            if node is not None and node.used == used and not node.pins and key not in self._children:
                return key
            heapq.heappop(self._heap)
        return None

    def _offer(self, key: bytes) -> None:
        node = self._nodes[key]
        if not node.pins and key not in self._children:
            heapq.heappush(self._heap, (node.used, key))
            if len(self._heap) > 4 * len(self._nodes) + 64:
                self._rebuild()

    def _rebuild(self) -> None:
        self._heap = [(n.used, k) for k, n in self._nodes.items() if not n.pins and k not in self._children]
        heapq.heapify(self._heap)


POLICIES = {"lru": LeafFirstLru}

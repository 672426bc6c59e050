"""Which chunk goes next. Pure data structures; the store asks, and does the rest."""

from __future__ import annotations

import heapq
from typing import Protocol

import msgspec


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


class _Node(msgspec.Struct, gc=False, eq=False):
    parent: bytes
    depth: int
    pins: int = 0
    rank: float = 0.0
    #: the rank with which it stands in the heap, if it does
    offered: float | None = None


class LeafFirst:
    """Evicts, of the chunks that no other chunk builds on, the one that ranks lowest; _rank() says what a use is worth.

    The heap holds (rank, key) and may be stale: an entry counts only while it equals the node's present state. Whoever asks
    for a victim has to take away the stale ones above it, and waits for that; so few are made. A node stands there once with
    each rank, and a chunk that got a child, just after it was added itself, is still the last entry and goes at once.
    """

    def __init__(self) -> None:
        self._nodes: dict[bytes, _Node] = {}
        self._children: dict[bytes, int] = {}
        self._heap: list[tuple[float, bytes]] = []

    def __len__(self) -> int:
        return len(self._nodes)

    def add(self, key: bytes, parent: bytes) -> None:
        above = self._nodes.get(parent)
        node = self._nodes[key] = _Node(parent, above.depth + 1 if above else 0)
        if parent:
            self._children[parent] = self._children.get(parent, 0) + 1
        node.rank = self._rank(node)
        self._offer(key)

    def touch(self, key: bytes) -> None:
        node = self._nodes[key]
        node.rank = self._rank(node)
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
            if not self._stale(self._heap[0]):
                return self._heap[0][1]
            heapq.heappop(self._heap)
        return None

    def _stale(self, entry: tuple[float, bytes]) -> bool:
        """Whether the entry does not count; then it is about to go."""
        rank, key = entry
        node = self._nodes.get(key)
        if node is not None and node.rank == rank:
            if not node.pins and key not in self._children:
                return False
            node.offered = None
        return True

    def _rank(self, node: _Node) -> float:
        """What the node is worth after the use that was just made of it; higher stays longer."""
        raise NotImplementedError

    def _offer(self, key: bytes) -> None:
        node = self._nodes[key]
        if not node.pins and key not in self._children and node.offered != node.rank:
            while self._heap and self._stale(self._heap[-1]):  # a heap without its last entry is one
                self._heap.pop()
            heapq.heappush(self._heap, (node.rank, key))
            node.offered = node.rank
            if len(self._heap) > 4 * len(self._nodes) + 64:
                self._rebuild()

    def _rebuild(self) -> None:
        self._heap = [(n.rank, k) for k, n in self._nodes.items() if not n.pins and k not in self._children]
        heapq.heapify(self._heap)
        for node in self._nodes.values():
            node.offered = None
        for rank, key in self._heap:
            self._nodes[key].offered = rank


class LeafFirstLru(LeafFirst):
    """Least recently used. A use of a chunk is a use of its whole prefix, so a parent is never older than its children."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = 0

    def _rank(self, node: _Node) -> float:
        self._clock += 1
        return self._clock


#: at this depth attention over the prefix costs as much as all else: 30k tokens for a model of 8B, in chunks of 256
_HALF_DEPTH = 117


def recompute_cost(depth: int) -> float:
    """What computing a chunk takes, in units of a prompt's first chunk: constant work and attention over `depth` chunks."""
    return 1.0 + depth / _HALF_DEPTH


class LeafFirstCost(LeafFirst):
    """Recompute cost x recency: GreedyDual-Size, for chains.

    A use lifts a chunk above the floor by what computing it again would take for each of its bytes (chunks are of one size;
    a tail counts as a whole one). The floor rises to the rank of whatever is evicted, so what is not used sinks, the cheap
    beginnings of prompts sooner than the dear ends of long ones.

    How often a chunk was used is left out on purpose. GDSF multiplies with it, and each turn of a conversation uses all
    before it: finished conversations then outlive running ones. On the agentic traces with a cache of 5 % of their chunks it
    saved 41 % of the work against 54 % (tests/bench/bench_eviction.py); with other sizes the difference is smaller.
    """

    def __init__(self) -> None:
        super().__init__()
        self._floor = 0.0

    def remove(self, key: bytes) -> None:
        if key == self.victim():  # an eviction; what is dropped for other reasons says nothing of the pressure
            self._floor = max(self._floor, self._nodes[key].rank)
        super().remove(key)

    def _rank(self, node: _Node) -> float:
        return self._floor + recompute_cost(node.depth)


POLICIES: dict[str, type[LeafFirst]] = {"lru": LeafFirstLru, "cost": LeafFirstCost}

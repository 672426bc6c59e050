"""What stands for a tier that could not be opened: it has nothing and takes nothing, and status and metrics say why."""

from __future__ import annotations

import numpy as np

from pdserve.transfer.tiers.base import ChunkRecord


class Absent:
    """See base.Tier."""

    indexed = True

    def __init__(self, name: str, why: str, capacity: int) -> None:
        self.name = name
        self._why, self._capacity = why, capacity

    def contains(self, keys: list[bytes]) -> list[ChunkRecord | None]:
        return [None] * len(keys)

    def get(self, record: ChunkRecord, into: list[np.ndarray], deadline: float) -> bool:
        return False

    def put(self, record: ChunkRecord, payload: list[np.ndarray], deadline: float) -> bool:
        return False

    def delete(self, keys: list[bytes]) -> int:
        return 0

    def clear(self) -> int:
        return 0

    def stats(self) -> dict[str, int | float | str]:
        return {"chunks": 0, "used_bytes": 0, "capacity_bytes": self._capacity, "state": self._why}

    def close(self) -> None:
        pass

"""The chunks that an engine has offered to the daemon of late, so that a prompt which is in the engine's own cache is not
offered again with each request. Pure: time is handed in."""

from __future__ import annotations

from collections import OrderedDict

#: The daemon may have evicted a chunk meanwhile: after this it is offered again.
TTL_S = 30.0
BOUND = 1 << 16


class Recent:
    def __init__(self) -> None:
        self._offered: OrderedDict[bytes, float] = OrderedDict()
        self._epoch: object = None

    def __len__(self) -> int:
        return len(self._offered)

    def at_epoch(self, epoch: object) -> None:
        """Forgets everything when this is not the daemon, or the content, that it was."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._offered.clear()

    def has(self, key: bytes, now: float) -> bool:
        at = self._offered.get(key)
        return at is not None and now - at < TTL_S

    def add(self, key: bytes, now: float) -> None:
        self._offered[key] = now
        self._offered.move_to_end(key)
        if len(self._offered) > BOUND:
            self._offered.popitem(last=False)

    def clear(self) -> None:
        self._offered.clear()

    def forget(self, keys: list[bytes]) -> None:
        for key in keys:
            self._offered.pop(key, None)

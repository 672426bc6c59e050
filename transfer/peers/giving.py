"""What this daemon sends to its peers: what an engine wants to be there, as it commits, and what they ask for themselves.

What they ask for may be in memory, then it goes at once; or on this host's disk, then it is brought up first, a few chunks at a
time and no later than the peer waits for it. A promise that cannot be kept is taken back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from pdserve.transfer.peers import messages
from pdserve.transfer.peers.link import Link
from pdserve.transfer.peers.push import Wanted
from pdserve.transfer.peers.rising import Rising
from pdserve.transfer.resident import Chunk
from pdserve.transfer.transports.base import TransportError

if TYPE_CHECKING:
    from pdserve.transfer.peers.node import Node

#: share of the arena that may be kept from eviction because peers are to get it
OUT_SHARE = 8
#: chunks that come up from disk for peers at once
RISING_AT_ONCE = 8


class LowerTiers(Protocol):
    """What lies below memory on this host (tiering.Tiering)."""

    def below(self, key: bytes) -> bool:
        """Whether any lower tier has it, as far as is known."""

    def on_disk(self, key: bytes) -> bool:
        """Whether a tier has it that is this host's own."""

    def bring_up(self, key: bytes, now: float) -> bool:
        """Begins to; whether it is on its way."""

    def watch_disk(self, told: Callable[[bytes, bool], None]) -> list[bytes] | None:
        """The keys on disk, None where there is no disk; from now on tells of each that comes or goes, in the loop."""

    def disk_speed(self) -> float:
        """Bytes per second that came from it lately."""


class Giving:
    """Runs in the daemon's loop."""

    def __init__(self, node: Node, lower: LowerTiers) -> None:
        self._node, self._lower = node, lower
        self._wanted = Wanted()
        self._rising = Rising()
        self._waking: asyncio.Handle | None = None

    @property
    def wanted(self) -> int:
        return len(self._wanted)

    @property
    def rising(self) -> int:
        return len(self._rising)

    def push(self, target: str, keys: Sequence[bytes], now: float) -> int:
        """Sends these to the peer, those that are here at once, the others when they commit. Returns how many it noted."""
        link = self._node.find(target)
        if link is None:
            return 0
        count = 0
        for key in keys:
            chunk = self._node.store.peek(key)
            if chunk is not None and chunk.committed:
                count += link.send(chunk)
            else:
                count += self._wanted.add(key, link.member.url, now)
        return count

    def asked(self, link: Link | None, request: messages.Pull, now: float) -> list[bool]:
        """For each key that a peer wants: whether it is sent."""
        if link is None:
            return [False] * len(request.keys)
        given = [self._give(link, key, now + request.seconds) for key in request.keys]
        self._bring_up(now)
        return given

    def _give(self, link: Link, key: bytes, ends: float) -> bool:
        chunk = self._node.store.peek(key)
        if chunk is not None and chunk.committed:
            return link.send(chunk)
        takes = link.member.takes(time.monotonic())
        return takes and self._lower.on_disk(key) and self._rising.add(key, link.member.url, ends)

    def may_queue(self, size: int) -> bool:
        queued = sum(link.outbox.nbytes for link in self._node.links())
        return not queued or queued + size <= self._node.store.allocator.capacity // OUT_SHARE

    def refill(self) -> None:
        """Something has been sent: what had no room before may have it now."""
        for link in self._node.links():
            link.refill()
        self._bring_up(time.monotonic())

    # ---- what the store tells ----

    def committed(self, chunk: Chunk) -> None:
        for url in self._wanted.take(chunk.key) + self._rising.take(chunk.key):
            if (link := self._node.link(url)) is not None:
                link.send(chunk)
        self._soon()

    def forgotten(self, chunk: Chunk) -> None:
        """Gone, or it could not be read from the disk."""
        self._take_back(chunk.key)
        self._soon()

    # ---- from the disk ----

    def _soon(self) -> None:
        """Not at once: the store is in the middle of something."""
        if self._waking is None and len(self._rising) > self._rising.begun:
            self._waking = asyncio.get_running_loop().call_soon(self._wake)

    def _wake(self) -> None:
        self._waking = None
        self._bring_up(time.monotonic())
        self._node.after()

    def _bring_up(self, now: float) -> None:
        size = self._node.chunk_bytes()
        # One that cannot begin now (an engine is writing it, it has just failed) does not keep those behind it waiting.
        for key in self._rising.waiting(4 * RISING_AT_ONCE):
            if self._rising.begun >= RISING_AT_ONCE or not self.may_queue(size):
                return
            chunk = self._node.store.peek(key)
            if chunk is not None and chunk.committed:
                self.committed(chunk)
            elif self._lower.bring_up(key, now):
                self._rising.begin(key)
            elif not self._lower.on_disk(key):
                self._take_back(key)

    def _take_back(self, key: bytes) -> None:
        for url in self._rising.take(key):
            if (link := self._node.link(url)) is not None:
                self._node.spawn(self._say_missing(link, key))

    async def _say_missing(self, link: Link, key: bytes) -> None:
        try:
            await link.call(messages.Missing(self._node.url, [key]))
        except TransportError as e:
            self._node.log.info("peer %s was not told that a chunk does not come: %s", link.member.name, e)

    # ---- time ----

    def forget(self, url: str) -> None:
        self._wanted.forget(url)
        self._rising.forget(url)

    def tick(self, now: float) -> None:
        self._wanted.expire(now)
        self._rising.expire(now)
        self.refill()

    def close(self) -> None:
        if self._waking is not None:
            self._waking.cancel()

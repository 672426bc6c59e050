"""What this daemon asks of its peers: what is predicted to be worth it, what is on its way, and how fast each peer turned out to be."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pdserve.transfer.peers import messages, pull
from pdserve.transfer.peers.directory import shorts
from pdserve.transfer.peers.inbox import IN_SHARE, Incoming
from pdserve.transfer.peers.membership import Member
from pdserve.transfer.peers.messages import DISK, MEMORY
from pdserve.transfer.peers.pull import Giver, Holder
from pdserve.transfer.transports.base import TransportError

if TYPE_CHECKING:
    from pdserve.transfer.peers.node import Node

#: what is pulled gets so long beyond three times what was predicted, and no longer than PULL_S whatever was
BEYOND_S = 1.0
PULL_S = 5.0
#: a key that could not be pulled is not asked for again for so long
AGAIN_S = 1.0
#: over how long a speed is measured, where more is on its way
METER_S = 0.1
#: what one member holds of the keys that are asked for: a flag for each, by place
_Held = tuple[Member, list[np.ndarray]]


@dataclass
class _Pull:
    """A chunk that a peer was asked for."""

    giver: Giver
    deadline: float


@dataclass
class _Meter:
    """What has come from a giver since `since`, while something was always asked of it."""

    since: float
    nbytes: int = 0


class Fetching:
    """Fits tiering.Beyond. Runs in the daemon's loop."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._pulls: dict[bytes, _Pull] = {}
        self._asked_of: Counter[Giver] = Counter()  # how many of them are of each
        self._not_before: dict[bytes, float] = {}
        self._meters: dict[Giver, _Meter] = {}
        #: tokens per second that the engines of this host compute, as they say themselves; 0: not said yet
        self.prefill_speed = 0.0

    def __len__(self) -> int:
        return len(self._pulls)

    # ---- what the tiering asks ----

    def ask(self, keys: Sequence[bytes], now: float) -> None:
        """`keys` begins with one that is nowhere here. Begins to fetch the run if that is predicted to be worth it."""
        marks = shorts(keys)
        held = [
            (member, [book.holds(member.url, marks) for book in self._node.directories])
            for member in self._node.givers(now)
        ]
        if not any(mask[0] for _, masks in held for mask in masks):
            return
        sizes = [m.chunk_bytes for m, masks in held if any(mask[0] for mask in masks)]
        chunk_bytes = max([*sizes, self._node.chunk_bytes(), 1])
        wanted, run = self._run(keys, held, chunk_bytes, now)
        if wanted:
            self._decide(wanted, run, chunk_bytes, now)

    def coming(self, key: bytes, now: float) -> bool:
        """Whether a client should wait for this key, which is not here yet."""
        asked = self._pulls.get(key)
        return self._node.inbox.coming(key) if asked is None else now < asked.deadline

    def _run(
        self, keys: Sequence[bytes], held: list[_Held], chunk_bytes: int, now: float
    ) -> tuple[list[bytes], list[list[Holder]]]:
        """What of the keys, up to the first that nobody has, can be asked for now, and who has it."""
        node = self._node
        budget = node.store.allocator.capacity // IN_SHARE - node.inbox.nbytes - len(self._pulls) * chunk_bytes
        queued = {member.url: self._queued(member, chunk_bytes) for member, _ in held}
        wanted: list[bytes] = []
        run: list[list[Holder]] = []
        for i, key in enumerate(keys):
            if key in self._pulls or node.store.peek(key) is not None or node.lower.below(key):
                continue
            holders = []
            for member, masks in held:
                place = next((p for p, mask in enumerate(masks) if mask[i]), None)  # in memory rather than on disk
                if place is not None:
                    holders.append(Holder(member.url, member.speed(place), queued[member.url], place))
            full = bool(wanted) and (len(wanted) + 1) * chunk_bytes > budget
            if not holders or self._not_before.get(key, 0.0) > now or full:
                break
            run.append(holders)
            wanted.append(key)
        return wanted, run

    def _queued(self, member: Member, chunk_bytes: int) -> float:
        """Seconds that it still sends what it was asked for."""
        places = (MEMORY, DISK)
        return sum(self._asked_of[member.url, place] * chunk_bytes / member.speed(place) for place in places)

    def _decide(self, wanted: list[bytes], run: list[list[Holder]], chunk_bytes: int, now: float) -> None:
        node = self._node
        plan, good = pull.decide(run, chunk_bytes, node.chunk_tokens, self.prefill_speed, PULL_S)
        if not good:
            node.metrics["peer_pull_decisions_total"].labels("too_slow").inc()
            self._not_before[wanted[0]] = now + AGAIN_S  # asked again it would be the same for a while
            for url, place in plan.parts:
                if (member := node.member(url)) is not None:
                    member.second_chance(place)
            return
        node.metrics["peer_pull_decisions_total"].labels("pull").inc()
        patience = min(PULL_S, BEYOND_S + 3 * plan.seconds)
        for giver, indices in plan.parts.items():
            keys = [wanted[i] for i in indices]
            for key in keys:
                self._pulls[key] = _Pull(giver, now + patience)
            self._asked_of[giver] += len(keys)
            self._meters.setdefault(giver, _Meter(now))
            node.spawn(self._pull(giver[0], keys, patience))

    async def _pull(self, url: str, keys: list[bytes], patience: float) -> None:
        coming = [False] * len(keys)
        link = self._node.link(url)
        try:
            for start in range(0, len(keys), messages.MAX_CHUNKS):
                part = keys[start : start + messages.MAX_CHUNKS]
                reply = await link.call(messages.Pull(self._node.url, part, patience)) if link else None
                if isinstance(reply, messages.Pulling):
                    coming[start : start + len(part)] = reply.coming[: len(part)]
        except TransportError as e:
            self._node.log.info("%d chunks were not pulled: %s", len(keys), e)
        for key, comes in zip(keys, coming, strict=False):
            if not comes:
                self._unpull(key, "missing")

    # ---- what came of it ----

    def missing(self, url: str, keys: Sequence[bytes]) -> None:
        """The peer takes its promise back."""
        for key in keys:
            if (asked := self._pulls.get(key)) is not None and asked.giver[0] == url:
                self._unpull(key, "missing")

    def arrived(self, member: Member | None, incoming: Incoming, now: float) -> None:
        """The inbox has published a chunk."""
        nbytes = incoming.chunk.payload_bytes
        asked = self._answered(incoming.chunk.key)
        if asked is None:
            if member is not None:
                member.at_least(nbytes, now - incoming.began)
        elif (giver := self._node.member(asked.giver[0])) is not None:
            self._measure(asked.giver, giver, nbytes, now)

    def failed(self, key: bytes) -> None:
        """The inbox has given it up."""
        self._unpull(key, "failed")

    def tick(self, now: float) -> None:
        self._not_before = {k: t for k, t in self._not_before.items() if t > now}
        for key in [k for k, p in self._pulls.items() if now > p.deadline and not self._node.inbox.coming(k)]:
            url, place = self._pulls[key].giver
            if (member := self._node.member(url)) is not None:
                member.too_slow(place)
            self._unpull(key, "late")

    def _unpull(self, key: bytes, why: str) -> None:
        if (asked := self._answered(key)) is not None:
            if asked.giver not in self._asked_of:
                self._meters.pop(asked.giver, None)
            self._not_before[key] = time.monotonic() + AGAIN_S
            self._node.metrics["peer_pull_decisions_total"].labels(why).inc()

    def _answered(self, key: bytes) -> _Pull | None:
        """A pull has ended, one way or the other."""
        asked = self._pulls.pop(key, None)
        if asked is not None:
            self._asked_of[asked.giver] -= 1
            if self._asked_of[asked.giver] <= 0:
                del self._asked_of[asked.giver]
        return asked

    def _measure(self, giver: Giver, member: Member, nbytes: int, now: float) -> None:
        """The speed is told by what comes while something is asked for, over long enough a time to be more than chance."""
        meter = self._meters.setdefault(giver, _Meter(now))
        meter.nbytes += nbytes
        idle = giver not in self._asked_of
        if idle or now - meter.since >= METER_S:
            member.observed(meter.nbytes, now - meter.since, giver[1])
            self._meters[giver] = _Meter(now)
        if idle:
            del self._meters[giver]

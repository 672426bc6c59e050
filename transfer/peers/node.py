"""This daemon among others: one Link for each peer, the directory, what is pulled and pushed. Runs in the daemon's loop.

Nothing here is needed for the cache to work on its own: a peer that is slow, wrong or gone makes a miss, never an error,
and nobody waits for one longer than was predicted and bounded beforehand.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve import log
from pdserve.errors import ProtocolError
from pdserve.transfer.peers import messages, pull
from pdserve.transfer.peers.directory import Directory, EventLog, shorts
from pdserve.transfer.peers.inbox import IN_SHARE, TIER, Inbox, Incoming
from pdserve.transfer.peers.link import Link
from pdserve.transfer.peers.membership import Member, Members
from pdserve.transfer.peers.push import Wanted
from pdserve.transfer.peers.sources import Source
from pdserve.transfer.resident import Chunk
from pdserve.transfer.store import Store
from pdserve.transfer.transports.base import Connection, Offer, Outcome, Slot, Transport, TransportError

#: between two looks at the list of peers
LIST_EVERY_S = 2.0
LIST_S = 10.0
#: share of the arena that may be kept from eviction because peers are to get it
OUT_SHARE = 8
#: what is pulled must be here by then, whatever was predicted
PULL_S = 5.0
#: a key that could not be pulled is not asked for again for so long
AGAIN_S = 1.0
#: over how long a speed is measured, where more is on its way
METER_S = 0.1
#: how long `pdserve status` waits for the other hosts
STATE_S = 2.0


@dataclass
class _Pull:
    """A chunk that a peer was asked for."""

    url: str
    deadline: float


@dataclass
class _Meter:
    """What has come from a peer since `since`, while something was always asked of it."""

    since: float
    nbytes: int = 0


class Node:
    """`below` says whether a lower tier here has a key, `after` is called when the store has changed."""

    def __init__(
        self,
        *,
        name: str,
        epoch: str,
        chunk_tokens: int,
        store: Store,
        metrics: dict[str, Any],
        transport: Transport,
        listen: str,
        source: Callable[[str], Source],
        below: Callable[[bytes], bool],
        after: Callable[[], None],
        state_file: Path | None = None,
    ) -> None:
        self.name, self.epoch, self.store, self.metrics, self.after = name, epoch, store, metrics, after
        self.url = ""
        self.log = log.get("peers")
        self.directory = Directory(
            on_resync=lambda peer: self.metrics["peer_resyncs_total"].labels(self._name(peer)).inc()
        )
        self.inbox = Inbox(store, metrics, self._arrived, after)
        self._chunk_tokens, self._transport, self._listen, self._make_source = chunk_tokens, transport, listen, source
        self._below, self._state_file = below, state_file
        self._events = EventLog(epoch)
        self._wanted = Wanted()
        self._members = Members(epoch=epoch)
        self._links: dict[str, Link] = {}
        self._pulls: dict[bytes, _Pull] = {}
        self._asked_of: Counter[str] = Counter()  # how many of them are of each peer
        self._not_before: dict[bytes, float] = {}
        self._meters: dict[str, _Meter] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._source: Source | None = None
        #: tokens per second that the engines of this host compute, as they say themselves; 0: not said yet
        self.prefill_speed = 0.0
        self._draining = False
        self._closing = False
        store.on_committed.append(self._committed)
        store.on_forgotten.append(lambda chunk: self._events.removed(chunk.key))

    # ---- beginning and end ----

    async def start(self) -> None:
        """Listens; raises StartError or ConfigError. The other peers may come whenever they like."""
        self.url = await self._transport.listen(self._listen, self)
        self._members = Members(self.url, self.epoch)
        self._source = self._make_source(self.url)
        self._spawn(self._follow())
        self.log.info("peers: %s listens at %s", self.name, self.url)

    async def stop(self) -> None:
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.close(bye=True) for link in links), return_exceptions=True)
        if self._source is not None:
            await asyncio.to_thread(self._source.close)
        await self._transport.close()
        self.inbox.close()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended_task)

    def _ended_task(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.log.error("a task of the peers ended badly", exc_info=task.exception())

    async def _follow(self) -> None:
        """Takes in who joins and lets go who leaves."""
        assert self._source is not None
        while True:
            try:
                listed = await asyncio.wait_for(asyncio.to_thread(self._source.peers), LIST_S)
                await self._listed(listed)
            except TimeoutError:
                self.log.warning("the list of peers was not had within %g s; it stays as it was", LIST_S)
            except Exception:
                self.log.exception("the list of peers could not be read; it stays as it was")
            await asyncio.sleep(LIST_EVERY_S)

    async def _listed(self, listed: dict[str, str]) -> None:
        joined, left = self._members.listed(listed)
        for member in joined:
            self.log.info("peer %s joins", member.name or member.url)
            self._links[member.url] = Link(self, member)
        for member in left:
            self.log.info("peer %s leaves", member.name or member.url)
            await self._part(member.url)

    async def _part(self, url: str) -> None:
        link = self._links.pop(url, None)
        self.directory.forget(url)
        self._wanted.forget(url)
        if link is not None:
            await link.close(bye=False)

    async def dial(self, url: str, deadline: float) -> Connection:
        return await self._transport.connect(url, self, deadline)

    def greeted(self, link: Link, greeting: messages.Greeting) -> None:
        """A peer's own word, at the beginning of each connection to it."""
        member = link.member
        if greeting.chunk_tokens != self._chunk_tokens and greeting.epoch != self.epoch:
            raise ProtocolError(f"its chunks are of {greeting.chunk_tokens} tokens, ours of {self._chunk_tokens}")
        if self._members.greeted(member, greeting.name, greeting.epoch):
            self.directory.forget(member.url)  # another start: nothing of what the former one had is believed
        elif member.ourselves:
            self._spawn(self._part_quietly(member.url))
            raise ProtocolError("that is this daemon itself")
        self.log.info("peer %s (%s) is up", member.name, member.url)

    async def _part_quietly(self, url: str) -> None:
        await self._part(url)

    # ---- what the tiering asks ----

    def ask(self, keys: Sequence[bytes], now: float) -> None:
        """`keys` begins with one that is nowhere here. Begins to fetch the run if that is predicted to be worth it."""
        givers = [link.member for link in self._links.values() if link.member.gives(now)]
        if not givers or self._closing:
            return
        marks = shorts(keys)
        held = [(member, self.directory.holds(member.url, marks)) for member in givers]
        if not any(mask[0] for _, mask in held):
            return
        chunk_bytes = max([m.chunk_bytes for m, mask in held if mask[0]] + [self._chunk_bytes(), 1])
        budget = self.store.allocator.capacity // IN_SHARE - self.inbox.nbytes - len(self._pulls) * chunk_bytes
        run: list[list[pull.Holder]] = []
        wanted: list[bytes] = []
        for i, key in enumerate(keys):
            if self._pulls.get(key) is not None or self.store.peek(key) is not None or self._below(key):
                continue
            holders = [self._holder(m, chunk_bytes) for m, mask in held if mask[i]]
            if (
                not holders
                or self._not_before.get(key, 0.0) > now
                or (wanted and (len(wanted) + 1) * chunk_bytes > budget)
            ):
                break
            run.append(holders)
            wanted.append(key)
        if wanted:
            self._decide(wanted, run, chunk_bytes, now)

    def _decide(self, wanted: list[bytes], run: list[list[pull.Holder]], chunk_bytes: int, now: float) -> None:
        plan = pull.plan(run, chunk_bytes)
        if plan.seconds > PULL_S or not pull.worth(len(wanted) * self._chunk_tokens, plan.seconds, self.prefill_speed):
            self.metrics["peer_pull_decisions_total"].labels("too_slow").inc()
            # Asked again it would be the same for a while; a speed that was once seen low must get its chance again.
            self._not_before[wanted[0]] = now + AGAIN_S
            for url in plan.parts:
                if (member := self._members.get(url)) is not None:
                    member.speed *= 1.05
            return
        self.metrics["peer_pull_decisions_total"].labels("pull").inc()
        for url, indices in plan.parts.items():
            keys = [wanted[i] for i in indices]
            for key in keys:
                self._pulls[key] = _Pull(url, now + min(PULL_S, 1.0 + 3 * plan.seconds))
            self._asked_of[url] += len(keys)
            self._meters.setdefault(url, _Meter(now))
            self._spawn(self._pull(url, keys))

    def coming(self, key: bytes, now: float) -> bool:
        """Whether a client should wait for this key, which is not here yet."""
        asked = self._pulls.get(key)
        return self.inbox.coming(key) if asked is None else now < asked.deadline

    def _holder(self, member: Member, chunk_bytes: int) -> pull.Holder:
        return pull.Holder(member.url, member.speed, self._asked_of[member.url] * chunk_bytes)

    def _chunk_bytes(self) -> int:
        stats = self.store.stats()
        return stats["used_bytes"] // stats["chunks"] if stats["chunks"] else 0

    async def _pull(self, url: str, keys: list[bytes]) -> None:
        coming = [False] * len(keys)
        link = self._links.get(url)
        try:
            for start in range(0, len(keys), messages.MAX_CHUNKS):
                part = keys[start : start + messages.MAX_CHUNKS]
                reply = await link.call(messages.Pull(self.url, part)) if link else None
                if isinstance(reply, messages.Pulling):
                    coming[start : start + len(part)] = reply.coming[: len(part)]
        except TransportError as e:
            self.log.info("%d chunks were not pulled: %s", len(keys), e)
        for key, comes in zip(keys, coming, strict=False):
            if not comes:
                self._unpull(key, "missing")

    def _unpull(self, key: bytes, why: str) -> None:
        if (asked := self._answered(key)) is not None:
            if asked.url not in self._asked_of:
                self._meters.pop(asked.url, None)
            self._not_before[key] = time.monotonic() + AGAIN_S
            self.metrics["peer_pull_decisions_total"].labels(why).inc()

    def _arrived(self, key: bytes, incoming: Incoming, reason: str) -> None:
        """The inbox has published a chunk, or given it up."""
        member = next((link.member for link in self._links.values() if link.member.name == incoming.peer), None)
        now = time.monotonic()
        if reason:
            self._unpull(key, "failed")
            self.log.info("a chunk from peer %s did not arrive: %s", incoming.peer, reason)
            if member is not None:
                self.count(member, "in", "failed")
            return
        nbytes = incoming.chunk.payload_bytes
        if member is not None:
            self.count(member, "in", "arrived")
            self.metrics["peer_bytes_total"].labels(member.name, "in").inc(nbytes)
        asked = self._answered(key)
        if asked is not None and (link := self._links.get(asked.url)) is not None:
            self._measure(link.member, nbytes, now)
        elif asked is None and member is not None:
            member.at_least(nbytes, now - incoming.began)

    def _answered(self, key: bytes) -> _Pull | None:
        """A pull has ended, one way or the other."""
        asked = self._pulls.pop(key, None)
        if asked is not None:
            self._asked_of[asked.url] -= 1
            if self._asked_of[asked.url] <= 0:
                del self._asked_of[asked.url]
        return asked

    def _measure(self, member: Member, nbytes: int, now: float) -> None:
        """The speed is told by what comes while something is asked for, over long enough a time to be more than chance."""
        meter = self._meters.setdefault(member.url, _Meter(now))
        meter.nbytes += nbytes
        idle = member.url not in self._asked_of
        if idle or now - meter.since >= METER_S:
            member.observed(meter.nbytes, now - meter.since)
            self._meters[member.url] = _Meter(now)
        if idle:
            del self._meters[member.url]

    # ---- what engines ask ----

    def push(self, target: str, keys: Sequence[bytes], now: float) -> int:
        """Sends these to the peer, those that are here at once, the others when they commit. Returns how many it noted."""
        member = self._members.find(target)
        link = self._links.get(member.url) if member else None
        if member is None or link is None:
            return 0
        count = 0
        for key in keys:
            chunk = self.store.peek(key)
            if chunk is not None and chunk.committed:
                count += link.send(chunk)
            else:
                count += self._wanted.add(key, member.url, now)
        return count

    def _committed(self, chunk: Chunk) -> None:
        self._events.added(chunk.key)
        for url in self._wanted.take(chunk.key):
            if (link := self._links.get(url)) is not None:
                link.send(chunk)

    def may_queue(self, size: int) -> bool:
        queued = sum(link.outbox.nbytes for link in self._links.values())
        return not queued or queued + size <= self.store.allocator.capacity // OUT_SHARE

    def refill(self) -> None:
        """Something has been sent: what had no room before may have it now."""
        for link in self._links.values():
            link.refill()

    # ---- what peers ask: the transport's Service ----

    def connected(self, connection: Connection) -> None:
        self.log.debug("connection from peer %s at %s", connection.peer, connection.address)

    def closed(self, connection: Connection, reason: str) -> None:
        self.log.debug("connection of peer %s ended: %s", connection.peer, reason)

    async def call(self, connection: Connection, payload: bytes) -> bytes:
        try:
            return messages.encode(await self._answer(connection.peer, messages.decode_request(payload)))
        except ProtocolError as e:
            return messages.encode(messages.No(str(e)[:1000]))

    async def _answer(self, peer: str, request: messages.Request) -> messages.Reply:
        match request:
            case messages.Greet():
                if request.version != messages.VERSION:
                    return messages.No(
                        f"this daemon speaks version {messages.VERSION} with its peers, the other {request.version}: "
                        "install the same pdserve on both hosts"
                    )
                return messages.Greeting(messages.VERSION, self.name, self.url, self.epoch, self._chunk_tokens)
            case messages.Sync():
                return self._events.answer(request, self._draining, self._chunk_bytes())
            case messages.Pull():
                return messages.Pulling(self._give(peer, request))
            case messages.Bye():
                if (member := self._members.get(request.url)) is not None and not member.ourselves:
                    member.gone = True
                    self.directory.forget(member.url)
                return messages.Done()
            case messages.AskState():
                return messages.State(await asyncio.to_thread(self.state))

    def _give(self, peer: str, request: messages.Pull) -> list[bool]:
        # By its name where our list has it at another address than it knows of itself (a relay, another network).
        member = self._members.get(request.url) or self._members.find(peer)
        link = self._links.get(member.url) if member else None
        given = []
        for key in request.keys:
            chunk = self.store.peek(key)
            given.append(link is not None and chunk is not None and chunk.committed and link.send(chunk))
        return given

    def reserve(self, connection: Connection, offers: Sequence[Offer]) -> Sequence[Slot | str]:
        return self.inbox.reserve(connection.peer, offers)

    def done(self, connection: Connection, slot: Slot, outcome: Outcome) -> None:
        self.inbox.done(slot, outcome)

    # ---- time, people ----

    def tick(self, now: float) -> None:
        """About once a second."""
        self._not_before = {k: t for k, t in self._not_before.items() if t > now}
        for key in [k for k, p in self._pulls.items() if now > p.deadline and not self.inbox.coming(k)]:
            if (link := self._links.get(self._pulls[key].url)) is not None:
                link.member.too_slow()
            self._unpull(key, "late")
        self._wanted.expire(now)
        self.refill()
        self.inbox.tick(now)

    def drain(self, on: bool) -> None:
        """Takes nothing new from peers, but gives; peers learn of it with their next look."""
        self._draining = self.inbox.draining = on

    def state(self) -> bytes:
        """What this host's supervisor has written down of its processes."""
        if self._state_file is None:
            return b""
        try:
            return self._state_file.read_bytes()[: 1 << 20]
        except OSError:
            return b""

    async def states(self) -> dict[str, bytes]:
        """The same of every peer that answers in time, by name."""
        links = list(self._links.values())

        async def ask(link: Link) -> bytes:
            with contextlib.suppress(TransportError):
                reply = await link.call(messages.AskState(), STATE_S)
                if isinstance(reply, messages.State):
                    return reply.json
            return b""

        answers = await asyncio.gather(*(ask(link) for link in links))
        return {link.member.name or link.member.url: a for link, a in zip(links, answers, strict=True)}

    def count(self, member: Member, direction: str, result: str, number: int = 1) -> None:
        self.metrics["peer_chunks_total"].labels(member.name or member.url, direction, result).inc(number)

    def refresh_gauges(self) -> None:
        now = time.monotonic()
        for link in self._links.values():
            label = link.member.name or link.member.url
            self.metrics["peer_up"].labels(label).set(link.member.state(now) in ("up", "draining"))
            self.metrics["peer_directory_keys"].labels(label).set(self.directory.size(link.member.url))
            self.metrics["peer_speed_bytes"].labels(label).set(link.member.speed)

    def status(self) -> dict[str, Any]:
        now = time.monotonic()
        return {
            "name": self.name,
            "url": self.url,
            "draining": self._draining,
            "incoming": len(self.inbox),
            "pulling": len(self._pulls),
            "wanted": len(self._wanted),
            "peers": [
                {
                    "name": link.member.name,
                    "url": link.member.url,
                    "state": link.member.state(now),
                    "chunks": self.directory.size(link.member.url),
                    "bytes_per_s": round(link.member.speed),
                    "outgoing": len(link.outbox.keys),
                    "error": link.member.last_error if link.member.state(now) == "down" else "",
                }
                for link in self._links.values()
            ],
        }

    def _name(self, url: str) -> str:
        member = self._members.get(url)
        return member.name or url if member else url


__all__ = ["TIER", "Node"]

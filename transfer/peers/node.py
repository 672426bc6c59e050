"""This daemon among others: who they are and what each says of itself. Runs in the daemon's loop.

What is asked of the others is fetching.py, what is sent to them giving.py, what arrives inbox.py. Nothing here is needed for
the cache to work on its own: a peer that is slow, wrong or gone makes a miss, never an error, and nobody waits for one longer
than was predicted and bounded beforehand.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pdserve import log
from pdserve.errors import ProtocolError
from pdserve.transfer.peers import messages
from pdserve.transfer.peers.directory import Directory, EventLog, short, shorts
from pdserve.transfer.peers.fetching import Fetching
from pdserve.transfer.peers.follow import Follower
from pdserve.transfer.peers.giving import Giving, LowerTiers
from pdserve.transfer.peers.inbox import Inbox, Incoming
from pdserve.transfer.peers.link import Link
from pdserve.transfer.peers.membership import Member, Members
from pdserve.transfer.peers.messages import DISK, MEMORY, PLACES
from pdserve.transfer.peers.sources import Source
from pdserve.transfer.resident import Chunk
from pdserve.transfer.store import Store
from pdserve.transfer.transports.base import Connection, Offer, Outcome, Slot, Transport, TransportError

#: how long `pdserve status` waits for the other hosts
STATE_S = 2.0


class Node:
    """`lower` is what lies below memory here, `after` is called when the store has changed."""

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
        lower: LowerTiers,
        after: Callable[[], None],
        state_file: Path | None = None,
    ) -> None:
        self.name, self.epoch, self.store, self.metrics, self.after = name, epoch, store, metrics, after
        self.chunk_tokens, self.lower = chunk_tokens, lower
        self.url = ""
        self.log = log.get("peers")
        #: what each peer holds, by place
        self.directories = [Directory(on_resync=self._resynced) for _ in PLACES]
        self.inbox = Inbox(store, metrics, self._arrived, after)
        self.fetching = Fetching(self)
        self.giving = Giving(self, lower)
        self._transport, self._listen, self._make_source = transport, listen, source
        self._state_file = state_file
        self._events = [EventLog(epoch) for _ in PLACES]
        self._has_disk = False
        self._members = Members(epoch=epoch)
        self._links: dict[str, Link] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._follower: Follower | None = None
        self._draining = False
        self._closing = False
        store.on_committed.append(self._committed)
        store.on_forgotten.append(self._forgotten)

    # ---- beginning and end ----

    async def start(self) -> None:
        """Listens; raises StartError or ConfigError. The other peers may come whenever they like."""
        on_disk = self.lower.watch_disk(self._on_disk)
        self._has_disk = on_disk is not None
        self._events[DISK].begin(shorts(on_disk or ()))
        self.url = await self._transport.listen(self._listen, self)
        self._members = Members(self.url, self.epoch)
        self._follower = Follower(self._make_source(self.url), lambda listed: self.spawn(self._listed(listed)))
        self.log.info("peers: %s listens at %s", self.name, self.url)

    async def stop(self) -> None:
        self._closing = True
        self.giving.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.close(bye=True) for link in links), return_exceptions=True)
        if self._follower is not None:
            await self._follower.stop()
        await self._transport.close()
        self.inbox.close()

    def spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended_task)

    def _ended_task(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.log.error("a task of the peers ended badly", exc_info=task.exception())

    async def _listed(self, listed: dict[str, str]) -> None:
        """Takes in who joins and lets go who leaves."""
        if self._closing:
            return
        joined, left = self._members.listed(listed)
        for member in joined:
            self.log.info("peer %s joins", member.name or member.url)
            self._links[member.url] = Link(self, member)
        for member in left:
            self.log.info("peer %s leaves", member.name or member.url)
            await self._part(member.url)

    async def _part(self, url: str) -> None:
        link = self._links.pop(url, None)
        self.forget(url)
        self.giving.forget(url)
        if link is not None:
            await link.close(bye=False)

    async def dial(self, url: str, deadline: float) -> Connection:
        return await self._transport.connect(url, self, deadline)

    def greeted(self, link: Link, greeting: messages.Greeting) -> None:
        """A peer's own word, at the beginning of each connection to it."""
        member = link.member
        if greeting.chunk_tokens != self.chunk_tokens and greeting.epoch != self.epoch:
            raise ProtocolError(f"its chunks are of {greeting.chunk_tokens} tokens, ours of {self.chunk_tokens}")
        member.disk = greeting.disk
        if self._members.greeted(member, greeting.name, greeting.epoch):
            self.forget(member.url)  # another start: nothing of what the former one had is believed
        elif member.ourselves:
            self.spawn(self._part_quietly(member.url))
            raise ProtocolError("that is this daemon itself")
        self.log.info("peer %s (%s) is up", member.name, member.url)

    async def _part_quietly(self, url: str) -> None:
        await self._part(url)

    # ---- who is there ----

    def links(self) -> list[Link]:
        return list(self._links.values())

    def link(self, url: str) -> Link | None:
        return self._links.get(url)

    def member(self, url: str) -> Member | None:
        link = self._links.get(url)
        return link.member if link is not None else None

    def find(self, target: str) -> Link | None:
        """By name, URL or address."""
        member = self._members.find(target)
        return self._links.get(member.url) if member is not None else None

    def givers(self, now: float) -> list[Member]:
        """Whom chunks may be asked of."""
        return [] if self._closing else [m for link in self._links.values() if (m := link.member).gives(now)]

    def forget(self, url: str) -> None:
        """What was believed of that peer's chunks."""
        for directory in self.directories:
            directory.forget(url)

    def _resynced(self, url: str) -> None:
        member = self._members.get(url)
        self.metrics["peer_resyncs_total"].labels(member.name or url if member else url).inc()

    # ---- what changes here ----

    def _committed(self, chunk: Chunk) -> None:
        self._events[MEMORY].note(short(chunk.key), True)
        self.giving.committed(chunk)

    def _forgotten(self, chunk: Chunk) -> None:
        self._events[MEMORY].note(short(chunk.key), False)
        self.giving.forgotten(chunk)

    def _on_disk(self, key: bytes, here: bool) -> None:
        self._events[DISK].note(short(key), here)

    def _arrived(self, key: bytes, incoming: Incoming, reason: str) -> None:
        """The inbox has published a chunk, or given it up."""
        member = next((link.member for link in self._links.values() if link.member.name == incoming.peer), None)
        if reason:
            self.fetching.failed(key)
            self.log.info("a chunk from peer %s did not arrive: %s", incoming.peer, reason)
            if member is not None:
                self.count(member, "in", "failed")
            return
        if member is not None:
            self.count(member, "in", "arrived")
            self.metrics["peer_bytes_total"].labels(member.name, "in").inc(incoming.chunk.payload_bytes)
        self.fetching.arrived(member, incoming, time.monotonic())

    def chunk_bytes(self) -> int:
        """Of a chunk here, roughly."""
        stats = self.store.stats()
        return stats["used_bytes"] // stats["chunks"] if stats["chunks"] else 0

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
                return messages.Greeting(
                    messages.VERSION, self.name, self.url, self.epoch, self.chunk_tokens, self._has_disk
                )
            case messages.Sync():
                speed = max(1, int(self.lower.disk_speed())) if request.place == DISK else 0
                return self._events[request.place].answer(request, self._draining, self.chunk_bytes(), speed)
            case messages.Pull():
                link = self._told_by(peer, request.url)
                return messages.Pulling(self.giving.asked(link, request, time.monotonic()))
            case messages.Missing():
                if (link := self._told_by(peer, request.url)) is not None:
                    self.fetching.missing(link.member.url, request.keys)
                return messages.Done()
            case messages.Bye():
                if (member := self._members.get(request.url)) is not None and not member.ourselves:
                    member.goodbye()
                    self.forget(member.url)
                return messages.Done()
            case messages.AskState():
                return messages.State(await asyncio.to_thread(self.state))

    def _told_by(self, peer: str, url: str) -> Link | None:
        # By its name where our list has it at another address than it knows of itself (a relay, another network).
        return self._links.get(url) or self.find(peer)

    def reserve(self, connection: Connection, offers: Sequence[Offer]) -> Sequence[Slot | str]:
        return self.inbox.reserve(connection.peer, offers)

    def done(self, connection: Connection, slot: Slot, outcome: Outcome) -> None:
        self.inbox.done(slot, outcome)

    # ---- time, people ----

    def tick(self, now: float) -> None:
        """About once a second."""
        self.fetching.tick(now)
        self.giving.tick(now)
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
            for place, tier in enumerate(PLACES):
                self.metrics["peer_directory_keys"].labels(label, tier).set(self._known(link, place))
                self.metrics["peer_speed_bytes"].labels(label, tier).set(link.member.speed(place))

    def status(self) -> dict[str, Any]:
        now = time.monotonic()
        return {
            "name": self.name,
            "url": self.url,
            "draining": self._draining,
            "incoming": len(self.inbox),
            "pulling": len(self.fetching),
            "wanted": self.giving.wanted,
            "rising": self.giving.rising,
            "peers": [
                {
                    "name": link.member.name,
                    "url": link.member.url,
                    "state": link.member.state(now),
                    "chunks": self._known(link, MEMORY),
                    "disk_chunks": self._known(link, DISK),
                    "bytes_per_s": round(link.member.speed()),
                    "outgoing": len(link.outbox.keys),
                    "error": link.member.last_error if link.member.state(now) == "down" else "",
                }
                for link in self._links.values()
            ],
        }

    def _known(self, link: Link, place: int) -> int:
        return self.directories[place].size(link.member.url)

"""The turns of nixl's thread against what the loop does in between. Needs no NIXL: the agent is a fake that says what it is asked."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from pdserve.transfer.transports import nixl
from pdserve.transfer.transports.base import Local, Piece
from pdserve.transfer.transports.outbox import Outbox, Parcel

THEIR_ARENA, SLOT = 0x10_0000, 8192
PIECE = Piece(key=b"k" * 32, shard=0, offset=4096, length=1000, digest=1, ticket=7)


class Agent:
    """Writes nothing, and is done at once."""

    def __init__(self, on_write: Any) -> None:
        self._on_write = on_write

    def get_agent_metadata(self) -> bytes:
        return b"metadata"

    def add_remote_agent(self, metadata: bytes) -> str:
        return "the peer"

    def register_memory(self, regions: Any, kind: str) -> object:
        return object()

    def get_xfer_descs(self, regions: Any, kind: str) -> Any:
        return regions

    def initialize_xfer(self, operation: str, ours: Any, theirs: Any, peer: str, text: bytes) -> object:
        self._on_write(ours, theirs)
        return object()

    def transfer(self, handle: object) -> str:
        return "PROC"

    def check_xfer_state(self, handle: object) -> str:
        return "DONE"

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        return {}

    def release_xfer_handle(self, handle: object) -> None:
        """Nothing is held."""

    remove_remote_agent = deregister_memory = release_xfer_handle


class LateOutbox(Outbox):
    """At the thread's first look, after it has obeyed all commands, the loop lends a slot and puts in what goes there."""

    meanwhile: Any = None

    def take(self, most_bytes: int, most: int, timeout: float) -> Any:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return super().take(most_bytes, most, timeout)


def test_a_slot_lent_between_obeying_and_taking_is_known():
    async def main() -> None:
        loop, arena = asyncio.get_running_loop(), np.zeros(1 << 16, np.uint8)
        happened: asyncio.Future[Any] = loop.create_future()

        def happens(what: Any) -> None:
            if not happened.done():
                happened.set_result(what)

        agent = Agent(lambda ours, theirs: loop.call_soon_threadsafe(happens, (ours, theirs)))
        library = SimpleNamespace(nixl_agent_config=lambda **_: None, nixl_agent=lambda name, config: agent)
        outbox = LateOutbox(1 << 20, 1 << 20)
        session: Any = SimpleNamespace(
            local=Local("a", arena),
            peer="b",
            outbox=outbox,
            post=loop.call_soon_threadsafe,
            tell_plane=lambda payload: None,
            lost=happens,
        )
        plane = nixl.NixlPlane(library)

        def tell(message: Any) -> None:
            plane.message(msgspec.msgpack.encode(message))

        def lend_and_put() -> None:
            tell(nixl._Lent(PIECE.ticket, SLOT, PIECE.length))
            outbox.put([(PIECE.ticket, PIECE)], Parcel(lambda: None))

        outbox.meanwhile = lend_and_put
        plane.start(session)
        try:
            tell(nixl._Hello(b"metadata", THEIR_ARENA))
            async with asyncio.timeout(30):
                what = await happened
        finally:
            await plane.close()
        target = [(THEIR_ARENA + SLOT, PIECE.length, 0)]
        assert what == ([(arena.ctypes.data + PIECE.offset, PIECE.length, 0)], target)

    asyncio.run(main())

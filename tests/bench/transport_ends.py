"""The two ends of every contender in bench_transports.py, each a process of its own: `transport_ends.py ROLE ARGUMENTS`.

A receiving role prints one JSON line that says how to reach it and lives until its standard input ends; a sending role prints
one JSON line per size and ends. Ours are here, the bare sockets in transport_bare.py, the libraries in transport_libraries.py.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # run with -P this folder is not searched
import transport_bare as bare
import transport_libraries as libraries
from transport_rounds import ARENA, ROUND, ROUNDS, SIZES, cpu, say, say_speed, shared_arena, until_stdin_ends

SECRET = b"the benchmark's own secret"


class Sink:
    """Lends its arena round and round."""

    def __init__(self) -> None:
        self.next = 0

    def connected(self, connection: Any) -> None:
        """Nothing to do."""

    def closed(self, connection: Any, reason: str) -> None:
        """Nothing to do."""

    async def call(self, connection: Any, payload: bytes) -> bytes:
        return b"%f" % cpu() if payload == b"cpu" else payload

    def reserve(self, connection: Any, offers: Any) -> list[Any]:
        from pdserve.transfer.transports.base import Slot

        slots = []
        for offer in offers:
            if self.next + offer.length > ARENA:
                self.next = 0
            slots.append(Slot(self.next, offer.length))
            self.next += offer.length
        return slots

    def done(self, connection: Any, slot: Any, outcome: Any) -> None:
        if not outcome.ok:
            raise SystemExit(f"a piece did not arrive: {outcome}")


def ours(name: str, url: str, pages: str) -> Any:
    from pdserve.transfer.transports import registry
    from pdserve.transfer.transports.base import Local
    from pdserve.transfer.transports.security import Security

    return registry.build(url, Local(name, shared_arena(pages == "huge")), Security(SECRET))


def serve(url: str, pages: str) -> None:
    async def main() -> None:
        transport = ours("b", url, pages)
        say(url=await transport.listen(url, Sink()))
        await asyncio.to_thread(until_stdin_ends)
        await transport.close()

    _run(main())


def push(url: str, query: str, pages: str) -> None:
    from pdserve import kernels
    from pdserve.transfer.transports.base import Piece

    async def main() -> None:
        transport = ours("a", url + query, pages)
        connection = await transport.connect(url, Sink(), time.monotonic() + 20)
        arena = transport.local.arena
        for size in SIZES:
            digests = [kernels.digest(arena[i * size : (i + 1) * size]) for i in range(ROUND // size)]
            pieces = [Piece(secrets.token_bytes(32), 0, i * size, size, d) for i, d in enumerate(digests)]
            await _rounds(connection, pieces, size)
        times = []
        for _ in range(1000):
            start = time.perf_counter()
            await connection.call(b"x" * 91, time.monotonic() + 10)
            times.append(time.perf_counter() - start)
        say(calls_us=sorted(times)[500] * 1e6, calls_p99_us=sorted(times)[990] * 1e6, **_plain(connection.stats()))
        await transport.close()

    _run(main())


def _plain(stats: dict[str, Any]) -> dict[str, Any]:
    return {"streams": stats.get("streams_used", 1)}


async def _rounds(connection: Any, pieces: list[Any], size: int) -> None:
    async def their_cpu() -> float:
        return float(await connection.call(b"cpu", time.monotonic() + 10))

    await connection.push(pieces, time.monotonic() + 60)
    speeds = []
    mine, theirs = cpu(), await their_cpu()
    for _ in range(ROUNDS):
        start = time.perf_counter()
        outcomes = await connection.push(pieces, time.monotonic() + 60)
        speeds.append(ROUND / (time.perf_counter() - start) / 1e9)
        if not all(o.ok for o in outcomes):
            raise SystemExit(f"a piece did not arrive: {next(o for o in outcomes if not o.ok)}")
    say_speed(size, speeds, cpu() - mine + await their_cpu() - theirs)


def _run(main: Any) -> None:
    import uvloop

    uvloop.run(main)
    sys.stdout.flush()
    os._exit(0)  # libraries of RDMA may take their time, or fall, when they are unloaded


if __name__ == "__main__":
    here = (serve, push)
    others = (bare.echo, bare.ping, bare.plain_serve, bare.plain_push, libraries.ucx_serve, libraries.ucx_push)
    others += (libraries.nixl_serve, libraries.nixl_push)
    others += (libraries.mooncake_serve, libraries.mooncake_push, libraries.mooncake_send)
    roles: dict[str, Any] = {role.__name__: role for role in (*here, *others)}
    roles[sys.argv[1]](*sys.argv[2:])

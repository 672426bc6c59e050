"""The two ends of every contender in bench_transports.py, each a process of its own: `transport_ends.py ROLE ARGUMENTS`.

A receiving role prints one JSON line that says how to reach it and lives until its standard input ends; a sending role prints
one JSON line per size and ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import secrets
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

MIB = 1 << 20
SIZES = (1 * MIB, 8 * MIB, 32 * MIB)
ARENA = 512 * MIB  # more than the processor's caches hold
ROUND = 256 * MIB
ROUNDS = 5
SECRET = b"the benchmark's own secret"


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


#: what a receiver of bare loops answers when a round is there: its own CPU seconds
ACK = struct.Struct("d")


def until_stdin_ends() -> None:
    sys.stdin.read()


def measured(size: int, once: Callable[[], float]) -> None:
    """Runs `once` (one round of this size; returns the other end's CPU seconds so far) several times and says the median."""
    theirs = once()
    speeds = []
    mine = cpu()
    latest = theirs
    for _ in range(ROUNDS):
        start = time.perf_counter()
        latest = once()
        speeds.append(ROUND / (time.perf_counter() - start) / 1e9)
    say_speed(size, speeds, cpu() - mine + latest - theirs)


def say_speed(size: int, speeds: list[float], used: float) -> None:
    say(size=size, gbs=statistics.median(speeds), cpu_per_gb=used / (len(speeds) * ROUND / 1e9))


# ---- ours ----


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


def ours(name: str, url: str) -> Any:
    from pdserve.transfer.transports import registry
    from pdserve.transfer.transports.base import Local
    from pdserve.transfer.transports.security import Security

    arena = np.random.default_rng(1).integers(0, 255, ARENA, np.uint8)
    return registry.build(url, Local(name, arena), Security(SECRET))


def serve(url: str) -> None:
    async def main() -> None:
        transport = ours("b", url)
        say(url=await transport.listen(url, Sink()))
        await asyncio.to_thread(until_stdin_ends)
        await transport.close()

    _run(main())


def push(url: str, query: str) -> None:
    from pdserve import kernels
    from pdserve.transfer.transports.base import Piece

    async def main() -> None:
        transport = ours("a", url + query)
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


# ---- bare TCP ----


def echo(host: str) -> None:
    with socket.create_server((host, 0)) as server:
        say(port=server.getsockname()[1])
        peer, _ = server.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := peer.recv(4096):
            peer.sendall(data)


def ping(host: str, port: str) -> None:
    with socket.create_connection((host, int(port))) as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        times = []
        for _ in range(1000):
            start = time.perf_counter()
            s.sendall(b"x" * 91)
            left = 91
            while left:
                left -= len(s.recv(left))
            times.append(time.perf_counter() - start)
    say(calls_us=sorted(times)[500] * 1e6, calls_p99_us=sorted(times)[990] * 1e6)


# ---- bare TCP, as many streams as ours: cold memory to cold memory, no frames, no digests, nothing decided on the way ----


def _streams_of(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _shares(size: int, streams: int) -> list[list[int]]:
    """Where each stream's pieces begin, in their order."""
    return [list(range(i * size, ROUND, streams * size)) for i in range(streams)]


def _threads(jobs: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def plain_serve(host: str) -> None:
    arena = np.ones(ARENA, np.uint8)
    with socket.create_server((host, 0)) as server:
        say(port=server.getsockname()[1])
        control, _ = server.accept()
        streams = [server.accept()[0] for _ in range(control.recv(1)[0])]

    def fill(sock: socket.socket, base: int, places: list[int], size: int) -> None:
        for place in places:
            view, filled = memoryview(arena)[base + place : base + place + size], 0
            while filled < size:
                filled += sock.recv_into(view[filled:], min(MIB, size - filled), socket.MSG_WAITALL)

    for size in SIZES:
        for round_ in range(ROUNDS + 1):
            base = round_ % 2 * ROUND
            shares = zip(streams, _shares(size, len(streams)), strict=True)
            _threads([lambda s=s, p=p, b=base, n=size: fill(s, b, p, n) for s, p in shares])  # type: ignore[misc]
            control.sendall(ACK.pack(cpu()))
    until_stdin_ends()


def plain_push(host: str, port: str, count: str) -> None:
    arena = np.random.default_rng(1).integers(0, 255, ARENA, np.uint8)
    control = socket.create_connection((host, int(port)))
    control.sendall(bytes([int(count)]))
    streams = [socket.create_connection((host, int(port))) for _ in range(int(count))]
    for stream in streams:
        _streams_of(stream)

    def send(sock: socket.socket, places: list[int], size: int) -> None:
        for place in places:
            sock.sendall(memoryview(arena)[place : place + size])

    def once(size: int) -> float:
        shares = zip(streams, _shares(size, len(streams)), strict=True)
        _threads([lambda s=s, p=p: send(s, p, size) for s, p in shares])  # type: ignore[misc]
        theirs: float = ACK.unpack(control.recv(ACK.size, socket.MSG_WAITALL))[0]
        return theirs

    for size in SIZES:
        measured(size, lambda size=size: once(size))  # type: ignore[misc]


# ---- UCX alone: tag messages, four under way ----


def _ucx(own: str) -> Any:
    from pdserve.transfer.transports.ucx_library import device_of

    os.environ["UCX_NET_DEVICES"] = device_of(own)
    os.environ.update(
        UCX_TLS="tcp", UCX_RNDV_SCHEME="put_zcopy", UCX_TCP_CM_REUSEADDR="y", UCX_WARN_UNUSED_ENV_VARS="n"
    )
    import ucxx

    ucxx.init(progress_mode="blocking")
    return ucxx


async def _ucx_meet(ucx: Any, reader: Any, writer: Any) -> Any:
    """An endpoint to whoever is at the other end of the socket."""
    own = bytes(memoryview(ucx.get_worker_address()))
    writer.write(len(own).to_bytes(4, "little") + own)
    theirs = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "little"))
    return await ucx.create_endpoint_from_worker_address(ucx.get_ucx_address_from_buffer(theirs))


async def _ucx_four(parts: list[Any]) -> None:
    """All of them, four under way at a time."""
    free = asyncio.Semaphore(4)

    async def one(part: Any) -> None:
        async with free:
            await part

    await asyncio.gather(*(one(part) for part in parts))


def ucx_serve(host: str) -> None:
    ucx = _ucx(host)
    tag = ucx._lib.libucxx.UCXXTag
    buffer = np.ones(ARENA, np.uint8)

    async def on_peer(reader: Any, writer: Any) -> None:
        endpoint = await _ucx_meet(ucx, reader, writer)
        for size in SIZES:
            for _ in range(ROUNDS + 1):
                parts = [
                    endpoint.recv(buffer[i * size : (i + 1) * size], tag=tag(i), force_tag=True)
                    for i in range(ROUND // size)
                ]
                await _ucx_four(parts)
                writer.write(ACK.pack(cpu()))

    async def main() -> None:
        server = await asyncio.start_server(on_peer, host, 0)
        say(port=server.sockets[0].getsockname()[1])
        await asyncio.to_thread(until_stdin_ends)
        os._exit(0)

    asyncio.run(main())


def ucx_push(host: str, port: str) -> None:
    from pdserve.transfer.transports.ucx_library import own_address

    ucx = _ucx(own_address(host))
    tag = ucx._lib.libucxx.UCXXTag
    source = np.random.default_rng(1).integers(0, 255, ARENA, np.uint8)

    async def main() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        endpoint = await _ucx_meet(ucx, reader, writer)
        for size in SIZES:
            speeds, mine, theirs, latest = [], 0.0, 0.0, 0.0
            for round_ in range(ROUNDS + 1):
                start = time.perf_counter()
                parts = [
                    endpoint.send(source[i * size : (i + 1) * size], tag=tag(i), force_tag=True)
                    for i in range(ROUND // size)
                ]
                await _ucx_four(parts)
                latest = ACK.unpack(await reader.readexactly(ACK.size))[0]
                if round_:
                    speeds.append(ROUND / (time.perf_counter() - start) / 1e9)
                else:
                    mine, theirs = cpu(), latest
            say_speed(size, speeds, cpu() - mine + latest - theirs)

    asyncio.run(main())
    sys.stdout.flush()
    os._exit(0)


# ---- NIXL alone: WRITE, four under way ----


def _nixl(name: str, buffer: np.ndarray) -> Any:
    os.environ["UCX_TLS"] = "tcp"
    from nixl_cu12._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    agent.register_memory([(buffer.ctypes.data, buffer.size, 0, "")], "DRAM")
    return agent


def nixl_serve(host: str) -> None:
    buffer = np.ones(ARENA, np.uint8)
    agent = _nixl("target", buffer)
    with socket.create_server((host, 0)) as server:
        say(port=server.getsockname()[1])
        peer, _ = server.accept()
        metadata = agent.get_agent_metadata()
        peer.sendall(len(metadata).to_bytes(4, "little") + buffer.ctypes.data.to_bytes(8, "little") + metadata)
        peer.setblocking(False)
        while True:
            for texts in agent.get_new_notifs().values():
                peer.setblocking(True)
                for _ in [t for t in texts if t == b"round"]:
                    peer.sendall(ACK.pack(cpu()))
                peer.setblocking(False)
            time.sleep(0.0001)
            try:
                if not peer.recv(1):
                    os._exit(0)
            except BlockingIOError:
                continue


def nixl_push(host: str, port: str) -> None:
    source = np.random.default_rng(1).integers(0, 255, ARENA, np.uint8)
    agent = _nixl("initiator", source)
    with socket.create_connection((host, int(port))) as s:
        length = int.from_bytes(s.recv(4, socket.MSG_WAITALL), "little")
        address = int.from_bytes(s.recv(8, socket.MSG_WAITALL), "little")
        peer = agent.add_remote_agent(s.recv(length, socket.MSG_WAITALL))
        peer = peer.decode() if isinstance(peer, bytes) else peer

        def write(offset: int, size: int, text: bytes) -> Any:
            ours = agent.get_xfer_descs([(source.ctypes.data + offset, size, 0)], "DRAM")
            theirs = agent.get_xfer_descs([(address + offset, size, 0)], "DRAM")
            handle = agent.initialize_xfer("WRITE", ours, theirs, peer, text)
            agent.transfer(handle)
            return handle

        def once(size: int) -> float:
            flying: list[Any] = []
            count = ROUND // size
            for i in range(count):
                flying.append(write(i * size, size, b"round" if i == count - 1 else b"part"))
                while len(flying) == 4 or (i == count - 1 and flying):
                    flying = [h for h in flying if agent.check_xfer_state(h) == "PROC" or agent.release_xfer_handle(h)]
            theirs: float = ACK.unpack(s.recv(ACK.size, socket.MSG_WAITALL))[0]
            return theirs

        for size in SIZES:
            measured(size, lambda size=size: once(size))  # type: ignore[misc]
    sys.stdout.flush()
    os._exit(0)


# ---- Mooncake's transfer engine ----


def mooncake_serve(host: str) -> None:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    assert engine.initialize(host, "P2PHANDSHAKE", "tcp", "") == 0
    buffer = np.ones(ARENA, np.uint8)
    assert engine.register_memory(buffer.ctypes.data, ARENA) == 0
    say(port=engine.get_rpc_port(), address=buffer.ctypes.data)
    until_stdin_ends()
    os._exit(0)


def _mooncake_writer(own: str, target: str, address: str) -> Callable[[int, int], None]:
    """write(nbytes, size): so many bytes, a piece of `size` after the other, into the target's arena."""
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    assert engine.initialize(own, "P2PHANDSHAKE", "tcp", "") == 0
    source = np.random.default_rng(1).integers(0, 255, ARENA, np.uint8)
    assert engine.register_memory(source.ctypes.data, ARENA) == 0
    there = int(address)

    def write(nbytes: int, size: int) -> None:
        for at in range(0, nbytes, size):
            part = min(size, nbytes - at)
            assert engine.transfer_sync_write(target, source.ctypes.data + at, there + at, part) == 0

    return write


def mooncake_send(own: str, host: str, port: str, address: str, nbytes: str, size: str, times: str) -> None:
    """The same bytes some times, one line for each: how a handover goes that begins when the prefill has ended."""
    write = _mooncake_writer(own, f"{host}:{port}", address)
    write(1 << 16, 1 << 16)  # connected, and warm
    for _ in range(int(times)):
        start = time.perf_counter()
        write(int(nbytes), int(size))
        say(seconds=time.perf_counter() - start)
    os._exit(0)


def mooncake_push(own: str, host: str, port: str, address: str) -> None:
    write = _mooncake_writer(own, f"{host}:{port}", address)

    def once(size: int) -> float:
        write(ROUND, size)
        return 0.0  # the receiver's is not known

    for size in SIZES:
        measured(size, lambda size=size: once(size))  # type: ignore[misc]
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    roles = {f.__name__: f for f in (serve, push, echo, ping, ucx_serve, ucx_push, nixl_serve, nixl_push)}
    roles |= {f.__name__: f for f in (mooncake_serve, mooncake_push, mooncake_send, plain_serve, plain_push)}  # type: ignore[dict-item]
    roles[sys.argv[1]](*sys.argv[2:])

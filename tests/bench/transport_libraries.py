"""The libraries alone: UCX tag messages and NIXL WRITE, four under way, and Mooncake's transfer engine."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from transport_rounds import ACK, ARENA, ROUND, ROUNDS, SIZES, cpu, measured, say, say_speed, until_stdin_ends

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

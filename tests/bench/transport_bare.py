"""Bare sockets: the ping-pong, and the same cold memory over as many streams as ours without anything decided on the way."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from transport_rounds import ACK, MIB, ROUND, ROUNDS, SIZES, cpu, measured, say, shared_arena, until_stdin_ends


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
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        if thread.is_alive():
            raise SystemExit("a stream of the bare loops stands still")


def plain_serve(host: str) -> None:
    arena = shared_arena()
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
    arena = shared_arena()
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

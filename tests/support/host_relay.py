"""A relay that holds everything back for a while, since this kernel may have no netem: one for an address, or all that leaves a host."""

from __future__ import annotations

import socket
import struct
import threading
import time

import netns

_SO_MARK, _SO_ORIGINAL_DST = 36, 80
_MARK = 1
#: pieces under way in one direction: not more than a long cable holds
_UNDER_WAY = 256


class Relay:
    """Listens on `host` and carries on to `target` with `delay` seconds each way. Without a target it takes every TCP
    connection that leaves the host from now on; those that were there before break when they are used again."""

    def __init__(self, host: netns.Host, port: int, target: tuple[str, int] | None, delay: float) -> None:
        self.host, self.target, self.delay = host, target, delay
        with host.inside():
            self._listener = socket.create_server((host.address if target else "0.0.0.0", port), backlog=128)
        self.url = f"tcp://{host.address}:{port}"
        self._sockets: list[socket.socket] = [self._listener]
        #: connections that were carried
        self.carried = 0
        threading.Thread(target=self._accept, daemon=True).start()
        if target is None:
            host.redirect(port, _MARK)

    def _accept(self) -> None:
        while True:
            try:
                one, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._connect, args=(one,), daemon=True).start()

    def _connect(self, one: socket.socket) -> None:
        try:
            other = self._dial(self.target or _original(one))
        except OSError:
            one.close()
            return
        self._sockets += [one, other]
        self.carried += 1
        for source, sink in ((one, other), (other, one)):
            self._carry(source, sink)

    def _dial(self, target: tuple[str, int]) -> socket.socket:
        with self.host.inside():
            other = socket.socket()
            other.setsockopt(socket.SOL_SOCKET, _SO_MARK, _MARK)
        try:
            other.settimeout(5)
            other.connect(target)
            other.settimeout(None)
        except OSError:
            other.close()
            raise
        return other

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        waiting: list[tuple[float, bytes]] = []
        more = threading.Condition()

        def read() -> None:
            data = b"."
            while data:
                try:
                    data = source.recv(1 << 16)
                except OSError:
                    data = b""
                with more:
                    more.wait_for(lambda: len(waiting) < _UNDER_WAY, 60)
                    waiting.append((time.monotonic() + self.delay, data))
                    more.notify_all()

        def write() -> None:
            while True:
                with more:
                    more.wait_for(lambda: bool(waiting), 3600)
                    when, data = waiting.pop(0)
                    more.notify_all()
                time.sleep(max(0.0, when - time.monotonic()))
                try:
                    if not data:
                        sink.shutdown(socket.SHUT_WR)
                        return
                    sink.sendall(data)
                except OSError:
                    return

        threading.Thread(target=read, daemon=True).start()
        threading.Thread(target=write, daemon=True).start()

    def close(self) -> None:
        """Breaks what it carries."""
        if self.target is None:
            self.host.redirect_no_more()
        for s in self._sockets:
            try:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
            finally:
                s.close()


def _original(redirected: socket.socket) -> tuple[str, int]:
    """Where a redirected connection wanted to go."""
    found = redirected.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
    (port,) = struct.unpack("!H", found[2:4])
    return socket.inet_ntoa(found[4:8]), port

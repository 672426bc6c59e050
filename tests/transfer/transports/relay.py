"""Something between two ends that can hold bytes up and cut: one thread, any number of connections."""

import contextlib
import selectors
import socket
import threading


class Relay:
    """Forwards 127.0.0.1:port to `target`. `held` says which connections (by number, the first is 0) pass nothing towards the
    target; the kernel's buffers then fill up, as they do when a host stops reading."""

    def __init__(self, target):
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.held = lambda number: False
        self.delay_s = 0.0
        self._pairs = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def _run(self):
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._stop.is_set():
                for key, _ in selector.select(0.02):
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif key.data is not None:
                        self._forward(selector, *key.data)

    def _accept(self, selector):
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
        except OSError:
            client.close()
            return
        number = len(self._pairs)
        self._pairs.append((client, server))
        for s in (client, server):
            s.settimeout(5)
        selector.register(client, selectors.EVENT_READ, (client, server, number, True))
        selector.register(server, selectors.EVENT_READ, (server, client, number, False))

    def _forward(self, selector, source, sink, number, towards_target):
        if towards_target and self.held(number):
            return
        try:
            data = source.recv(1 << 16)
            if data:
                sink.sendall(data)
                return
        except OSError:
            pass
        for s in (source, sink):
            with contextlib.suppress(KeyError, ValueError):
                selector.unregister(s)
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    def cut(self):
        for pair in self._pairs:
            for s in pair:
                with contextlib.suppress(OSError):
                    s.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._stop.set()
        self._thread.join(10)
        self.cut()
        for pair in self._pairs:
            for s in pair:
                s.close()
        self._listener.close()

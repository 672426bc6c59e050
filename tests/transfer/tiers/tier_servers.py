"""The real servers that remote tiers are tested and measured against, each on a free port and ended by its own pid."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))  # benchmarks use this module as well

from ports import free_port

START_S = 90.0


class Missing(Exception):
    """A server's program is not installed; the text says how to get it."""


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


class Server:
    """One process in a folder of its own."""

    def __init__(
        self, argv: list[str | Path], ready: Callable[[], bool], folder: Path, env: dict[str, str] | None = None
    ):
        self.folder = folder
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*_with_parent(), *map(str, argv)],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        ends = time.monotonic() + START_S
        while not ready():
            if self.process.poll() is not None or time.monotonic() > ends:
                said = (folder / "log").read_text(errors="replace")[-2000:]
                self.kill()
                raise RuntimeError(f"{argv[0]} did not start:\n{said}")
            time.sleep(0.05)

    def stop(self) -> None:
        """SIGSTOP: connections stay open and nothing is answered."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)
        shutil.rmtree(self.folder, ignore_errors=True)


def _with_parent() -> list[str]:
    """So that a test run that is killed leaves no servers behind."""
    return ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []


def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="pdserve-tier-"))


class Redis(Server):
    """redis-server (or valkey-server) with a password, plain or with TLS only; forgets everything when it ends."""

    def __init__(self, tls: tuple[Path, Path, Path] | None = None, port: int = 0, password: str = ""):
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            raise Missing("redis-server is not installed: apt-get install -y redis-server")
        self.port, self.password = port or free_port(), password or secrets.token_hex(8)
        argv = [program, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--requirepass", self.password]
        if tls:
            ca, cert, key = tls
            argv += ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            argv += ["--tls-ca-cert-file", ca, "--tls-cert-file", cert, "--tls-key-file", key]
        else:
            argv += ["--port", str(self.port)]
        super().__init__(argv, lambda: answers(self.port), _folder())

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"


class LocalBucket(Server):
    """An S3 server that keeps buckets as folders."""

    access, secret = "test-access", "test-secret"

    def __init__(self) -> None:
        program = Path(sys.executable).parent / "localbucket"
        if not program.exists():
            raise Missing("localbucket is not installed: pip install localbucket")
        self.port = free_port()
        folder = _folder()
        super().__init__([program, "--port", str(self.port), folder / "data"], lambda: answers(self.port), folder)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Moto(Server):
    """moto's S3 in a process of its own."""

    def __init__(self) -> None:
        program = Path(sys.executable).parent / "moto_server"
        if not program.exists():
            raise Missing("moto is not installed: pip install 'moto[server,s3]'")
        self.port = free_port()
        argv = [program, "-H", "127.0.0.1", "-p", str(self.port)]
        super().__init__(argv, lambda: answers(self.port), _folder())

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"


LENDER = """
import sys, time
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
sys.exit(1) if store.setup("127.0.0.1", "P2PHANDSHAKE", int(sys.argv[2]), 16 << 20, "tcp", "", sys.argv[1]) else None
open("ready", "w").close()
time.sleep(86400)
"""


class Mooncake(Server):
    """mooncake_master, and a process that lends memory to the pool."""

    def __init__(self, memory: int = 512 << 20) -> None:
        program = Path(sys.executable).parent / "mooncake_master"
        if not program.exists():
            raise Missing("mooncake_master is not installed: pip install mooncake-transfer-engine-non-cuda")
        try:
            ctypes.CDLL("libibverbs.so.1")
        except OSError as e:
            raise Missing(f"{e}: apt-get install -y libibverbs1") from e
        self.port, self.metrics_port = free_port(), free_port()
        argv = [program, f"--rpc_port={self.port}", f"--metrics_port={self.metrics_port}"]
        super().__init__(argv, lambda: answers(self.port), _folder())
        folder = _folder()
        lend = [sys.executable, "-P", "-c", LENDER, f"127.0.0.1:{self.port}", str(memory)]
        try:
            self.lender = Server(lend, (folder / "ready").exists, folder)
        except BaseException:
            super().kill()
            raise

    @property
    def url(self) -> str:
        return f"mooncake://127.0.0.1:{self.port}?metrics_port={self.metrics_port}"

    def kill(self) -> None:
        if hasattr(self, "lender"):
            self.lender.kill()
        super().kill()


class Relay:
    """A TCP relay in front of a server that can be told to cut a connection in the middle, or to go silent."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        #: bytes towards the server after which the connection is reset; None for never. Counted from when it is set.
        self.cut_after: int | None = None
        self._open = threading.Event()
        self._open.set()
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def silence(self) -> None:
        self._open.clear()

    def go_on(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset_all()

    def reset_all(self) -> None:
        with self._lock:
            for s in self._sockets:
                with contextlib.suppress(OSError):
                    s.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._to), 5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._sockets |= {near, far}
                self.connections += 1
            for a, b, up in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pump, args=(a, b, up), daemon=True).start()

    def _pump(self, source: socket.socket, to: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._open.wait(60)
                if up and self.cut_after is not None:
                    if len(data) > self.cut_after:
                        to.sendall(data[: self.cut_after])
                        break
                    self.cut_after -= len(data)
                to.sendall(data)
        for s in (source, to):
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
        with self._lock:
            gone = source in self._sockets and to in self._sockets
            self._sockets -= {source, to}
        if not gone:  # the other direction's thread has ended as well
            source.close()
            to.close()


def make_certificates(folder: Path) -> tuple[Path, Path, Path]:
    """(authority, certificate of 127.0.0.1, its key), made with openssl."""
    if shutil.which("openssl") is None:
        raise Missing("openssl is not installed: apt-get install -y openssl")

    def openssl(*words: str | Path) -> None:
        subprocess.run(["openssl", *map(str, words)], cwd=folder, check=True, capture_output=True, timeout=60)

    ca, ca_key, cert, key, asked = (folder / n for n in ("ca.pem", "ca.key", "cert.pem", "cert.key", "cert.csr"))
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *curve, "-keyout", ca_key, "-out", ca, "-subj", "/CN=test authority", "-days", "2")
    openssl("req", *curve, "-keyout", key, "-out", asked, "-subj", "/CN=127.0.0.1")
    (folder / "extra").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    signed = ("-CAcreateserial", "-days", "2", "-extfile", folder / "extra")
    openssl("x509", "-req", "-in", asked, "-CA", ca, "-CAkey", ca_key, *signed, "-out", cert)
    return ca, cert, key
